"""Training of Stable Video Diffusion: the paper's loss, what clips are told, runs that resume bit by bit, models that load.

Shapes: B rows, F frames, C latent channels, h × w places.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import reelflow
from reelflow.adapters.lora import Lora, merge
from reelflow.clip import Clip
from reelflow.data.toybox import FPS, render, sample_scene, simulate
from reelflow.pipelines.svd import Diffusion
from reelflow.training.config import load
from reelflow.training.run import write_result
from reelflow.training.samples import write_samples
from reelflow.training.shards import PreparedLatents
from reelflow.training.svd.config import SvdConfig
from reelflow.training.svd.data import motion_strength, speeds
from reelflow.training.svd.objective import SvdFeed, target
from reelflow.training.svd.shows import PreparedShows, RawShows, Shown

SCRIPT = Path(__file__).with_name("svd_run.py")
small = runpy.run_path(str(SCRIPT))
settings, make = small["settings"], small["make"]


@pytest.fixture(autouse=True)
def _one_thread(_seeded: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("svd")
    small["write"](folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run that never stopped."""
    trainer = make(settings(folder), folder / "whole")
    trainer.run()
    trainer.checkpoints.close()
    return write_result(trainer)


def curve(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "loss", "grad_norm", "skipped")} for row in rows]


# --- the loss


def test_the_loss_is_the_papers(folder: Path, tmp_path: Path) -> None:
    """(1 + σ²) / σ² · |D − x|² with D from Karras' preconditioning, in float64, averaged over rows and values."""
    trainer = make(settings(folder), tmp_path)
    objective = trainer.objective
    objective.unet.double()
    (rows,) = trainer.feed(0)
    rows = rows._replace(**{name: value.double() for name, value in rows._asdict().items() if isinstance(value, torch.Tensor)})
    x, sigma = rows.x, rows.sigma_B[:, None, None, None, None]
    noisy = x + sigma * rows.noise
    with torch.no_grad():
        v = objective.velocity(*rows[:6]).double()
    skip, out = 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1).sqrt()
    weighted = (1 + sigma**2) / sigma**2 * (skip * noisy + out * v - x).square()
    assert float(objective.backward(rows, 0)) == pytest.approx(float(weighted.mean()), rel=1e-5)
    torch.testing.assert_close(skip * noisy + out * target(x, rows.noise, sigma), x)


def test_what_is_drawn(folder: Path, tmp_path: Path) -> None:
    """Levels are log-normal as configured; each condition is dropped as often as asked, never all of what a row has but as said."""
    config = settings(folder, p_mean=0.5, p_std=1.2, drop=0.2, stages=[{"steps": 1, "buckets": [{"frames": 2, "batch": 600}]}])
    (rows,) = SvdFeed(config, PreparedShows(config))(0)
    levels = rows.sigma_B.log()
    assert float(levels.mean()) == pytest.approx(0.5, abs=0.15)
    assert float(levels.std()) == pytest.approx(1.2, rel=0.1)
    states, picture = (value.flatten(1).abs().amax(1) > 0 for value in (rows.states, rows.picture))
    shares = [float((a & b).float().mean()) for a, b in ((states, picture), (~states, picture), (states, ~picture), (~states, ~picture))]
    assert shares == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.05)
    assert float(rows.noise.std()) == pytest.approx(1, abs=0.02)


# --- what clips are told


def test_movement_is_that_of_the_scene_at_any_rate() -> None:
    """Within a quarter for one thing on plain ground, whatever its shape; twice as far from frame to frame at half the rate."""
    found = 0
    for index in range(40):
        scene = sample_scene(3, index, things=1)
        if scene.gradient or scene.wall or not scene.things[0].moves:
            continue
        for rate in (30.0, 8.0):
            frames, path = render([scene], 6, pace=FPS / rate)[0], simulate(scene, 6, pace=FPS / rate)[:, 0]
            moved = np.abs(np.diff(path, axis=0)).sum(1).mean() / 128
            assert float(speeds(frames.permute(0, 3, 1, 2)).mean()) == pytest.approx(moved, rel=0.3), scene
            assert moved * rate == pytest.approx(abs(scene.things[0].vx + scene.things[0].vy) * FPS / 128, rel=0.5)
        found += 1
    assert found > 5


def test_a_scene_at_another_pace_is_the_same_scene() -> None:
    for index in range(12):
        scene = sample_scene(5, index, things=1)
        np.testing.assert_allclose(simulate(scene, 11, pace=0.5)[::2], simulate(scene, 6), atol=1e-6)


def test_motion_strength_grows_with_movement() -> None:
    found = [motion_strength(speed) for speed in (-1.0, 0.0, 0.1, 0.25, 0.49, 0.5, 7.0)]
    assert found == sorted(found)
    assert (found[0], found[1], found[3], found[-1]) == (1, 1, 128, 255)


def test_rows_are_as_they_were_prepared(folder: Path) -> None:
    """The frames of a row, the picture, the rate and the motion belong together."""
    config = settings(folder, stages=[{"steps": 6, "buckets": [{"frames": 3, "batch": 4}]}])
    source = PreparedShows(config)
    entries = {round(float(source.prepared.tensor(entry, "rate")), 2): entry for entry in source.prepared.entries}
    assert len(entries) == 5
    strides = set()
    for step in range(6):
        for row in range(4):
            shown = source(step).row(row)
            fits = [
                (rate, stride, place)
                for rate in entries for stride in (1, 2, 3, 4) for place in (0, 1, 2)
                if torch.equal(shown.picture, source.prepared.tensor(entries[rate], "picture")[place])
                and abs(rate / stride - 1 - float(shown.ids[0])) < 1e-4
            ]  # fmt: skip
            ((rate, stride, place),) = fits
            start, span = place * 4, 2 * stride
            mean = source.prepared.read(entries[rate], start, span + 1)[0][0, ::stride]
            torch.testing.assert_close(shown.latents, mean * source.scaling)
            speed = source.prepared.tensor(entries[rate], "speed")[start : start + span].mean() * rate
            assert int(shown.ids[1]) == motion_strength(float(speed))
            assert float(shown.ids[2]) == float(source.prepared.tensor(entries[rate], "noise")[place])
            assert rate / stride >= 3
            strides.add(stride)
    assert len(strides) > 1


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_clips_that_are_not_prepared_give_the_same_rows(folder: Path, tmp_path: Path, posterior: str) -> None:
    data = {"toybox": {"count": 3}, "frames": 9, "posterior": posterior}
    ready = small["write"](tmp_path, data=data)
    prepared, raw = PreparedShows(ready), RawShows(settings(tmp_path, data=data, latents=None), tmp_path / "run")
    assert raw.states == prepared.states
    for step in (0, 1, 5, 1):
        ours, theirs = raw(step), prepared(step)
        assert ours.size == theirs.size
        for row in range(ours.size):
            for name, one, other in zip(Shown._fields, ours.row(row), theirs.row(row), strict=True):
                tolerance = 0 if name == "ids" else 0.02 * float(other.abs().max())  # what is prepared is kept in bfloat16
                torch.testing.assert_close(one, other.to(one.dtype), rtol=0, atol=tolerance, msg=name)
    raw.close()


def test_a_run_on_clips_that_are_not_prepared_ends_in_a_model_that_loads(folder: Path, tmp_path: Path) -> None:
    config = settings(folder, latents=None, stages=[{"steps": 2, "buckets": [{"frames": 3, "batch": 2}]}])
    trainer = make(config, tmp_path / "run")
    trainer.run()
    trainer.feed.source.close()
    found = write_result(trainer)
    clip = reelflow.load(found, "cpu").animate(render([sample_scene(1, 2)], 1, 64)[0, 0].numpy(), seed=1, sampling=Diffusion(steps=1))
    assert clip.frames.shape == (4, 64, 64, 3)


def test_recorded_clips_are_played_at_their_rate(tmp_path: Path, folder: Path) -> None:
    """A file whose frames grow brighter, at 24 per second: at a rate r, neighbours differ by 24 / r steps. No captions are needed."""
    clips = tmp_path / "clips"
    clips.mkdir()
    frames = np.repeat(np.arange(0, 240, 2, dtype=np.uint8)[:, None, None, None], 64, 1).repeat(64, 2).repeat(3, 3)
    Clip(frames, 24).save(clips / "a.mp4")
    (clips / "a.txt").write_text("brighter")
    Image.new("RGB", (64, 64)).save(clips / "still.png")
    (clips / "still.txt").write_text("black")
    data = {"folder": str(clips), "frames": 5, "max_failed_share": 0.6}
    config = settings(folder, data=data, latents=str(tmp_path / "latents"), rates=[6, 12])
    from reelflow.training.latents import Preparation

    work = Preparation(config)
    found = work.run()
    assert (found["clips"], found["failed"]) == (1, 1)
    assert "one picture; motion is learned from videos" in (tmp_path / "latents" / "failures.jsonl").read_text()
    (entry,) = PreparedLatents(tmp_path / "latents").entries
    rate = float(PreparedLatents(tmp_path / "latents").tensor(entry, "rate"))
    assert 6 <= rate <= 12
    sample = next(sample for sample in work.source.samples(0) if sample.key.endswith("a.mp4"))
    view = work.keeper.view
    piece = view.take(sample, view.measure(sample), 5, 5, 0).frames[0, :, 32, 32, 1].astype(float)
    assert np.diff(piece).mean() == pytest.approx(2 * 24 / rate, rel=0.1)


# --- runs


def test_resuming_is_bit_identical(folder: Path, whole: Path, tmp_path: Path) -> None:
    stopped = make(settings(folder), tmp_path)
    for _ in range(2):
        stopped.train_step()
    stopped.save()
    stopped.checkpoints.close()
    resumed = make(settings(folder), tmp_path)
    assert resumed.step == 2
    resumed.run()
    again = make(settings(folder), folder / "whole")
    assert again.step == 4
    first, second = small["weights"](resumed), small["weights"](again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert curve(tmp_path)[-1] == curve(folder / "whole")[-1]


@pytest.mark.timeout(900)  # processes wait for each other, on a busy machine for long
def test_two_ranks_are_as_one(folder: Path, whole: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-W", "ignore", SCRIPT, folder, "pair"], env={**shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    assert [process.wait(timeout=800) for process in processes] == [0, 0]
    for ours, alone in zip(curve(folder / "pair"), curve(folder / "whole"), strict=True):
        assert ours["step"] == alone["step"]
        assert [ours[key] for key in ("loss", "grad_norm")] == pytest.approx([alone[key] for key in ("loss", "grad_norm")], rel=1e-4)


def test_parts_and_recomputation_change_nothing(folder: Path, whole: Path, tmp_path: Path) -> None:
    trainer = make(settings(folder, accumulate=2, recompute=True), tmp_path)
    trainer.run()
    for ours, alone in zip(curve(tmp_path), curve(folder / "whole"), strict=True):
        assert [ours[key] for key in ("loss", "grad_norm")] == pytest.approx([alone[key] for key in ("loss", "grad_norm")], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_changes_every_weight(folder: Path, tmp_path: Path, optimizer: str) -> None:
    trainer = make(settings(folder, optimizer=optimizer), tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.weights.items()}
    row = trainer.train_step()
    assert [name for name, p in trainer.weights.items() if torch.equal(p, before[name])] == []
    assert row.keys() == {"loss", "grad_norm"}


def test_steps_lower_the_loss_of_a_fixed_batch(folder: Path, tmp_path: Path) -> None:
    trainer = make(settings(folder, lr=3e-3, stages=[{"steps": 12, "buckets": [{"frames": 3, "batch": 3}]}]), tmp_path)
    rows = trainer.feed(0)
    trainer.feed = lambda step: rows
    losses = [trainer.train_step()["loss"] for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


# --- results


def test_the_model_loads_in_diffusers_and_here_with_the_same_frames(folder: Path, whole: Path) -> None:
    picture = Image.fromarray(render([sample_scene(1, 2)], 1, 64)[0, 0].numpy())
    pipe = reelflow.load(whole, "cpu")
    assert (pipe.about.name, pipe.own_size, pipe.about.frames) == ("tiny-svd", (64, 64), 4)
    ours = pipe.animate(picture, seed=3, sampling=Diffusion(steps=3, fps=7, guidance=3.0, reference="diffusers")).frames
    theirs = StableVideoDiffusionPipeline.from_pretrained(str(whole), local_files_only=True).to(torch.float32)
    theirs.set_progress_bar_config(disable=True)
    made = theirs(
        picture, height=64, width=64, num_inference_steps=3, generator=torch.Generator().manual_seed(3), output_type="np"
    ).frames[0]  # fmt: skip
    assert np.abs(ours.astype(int) - np.round(made * 255).astype(int)).max() <= 1
    average = make(settings(folder), folder / "whole").averaged()
    stored = load_file(whole / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[name.removeprefix("unet.")], value.half()) for name, value in average.items())


def test_fine_tuning_begins_with_all_of_a_model(folder: Path, whole: Path, tmp_path: Path) -> None:
    data = {"toybox": {"count": 2}, "frames": 4, "posterior": "sample"}
    values = {"init": str(whole), "latents": str(tmp_path / "latents"), "data": data}
    stages = {"stages": [{"steps": 1, "buckets": [{"frames": 4, "batch": 2}]}], "precision": "float32", "about": {"name": "mine"}}
    path = tmp_path / "fine.yaml"
    path.write_text(json.dumps(values | stages))
    config = load(path)
    assert isinstance(config, SvdConfig)
    assert (config.about.name, config.vae) == ("mine", whole / "vae")
    from reelflow.training.latents import prepare

    prepare(config)
    trainer = make(config, tmp_path / "run")
    stored = load_file(whole / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(p, stored[name.removeprefix("unet.")].float()) for name, p in trainer.weights.items())
    trainer.run()
    made = reelflow.load(write_result(trainer), "cpu")
    assert made.about.name == "mine"
    assert len(made.animate(render([sample_scene(1, 2)], 1, 64)[0, 0].numpy(), seed=0, sampling=Diffusion(steps=1))) == 4


def test_sampling_begins_at_the_level_asked_for(folder: Path, tmp_path: Path) -> None:
    from reelflow.training.svd.export import scheduler

    assert scheduler(settings(folder)).config.sigma_max == 700
    changes = {"sigma_max": 80.0, "stages": [{"steps": 1, "buckets": [{"frames": 2, "batch": 1}]}]}
    trainer = make(settings(folder, **changes), tmp_path / "run")
    trainer.run()
    made = write_result(trainer)
    assert reelflow.load(made, "cpu").scheduler.config.sigma_max == 80
    goes_on = {"init": str(made), "latents": str(folder), "unet": {}, "image_encoder": {}}
    assert scheduler(SvdConfig.parse(small["SETTINGS"] | goes_on)).config.sigma_max == 80
    assert scheduler(SvdConfig.parse(small["SETTINGS"] | goes_on | {"sigma_max": 50})).config.sigma_max == 50
    with pytest.raises(ValueError, match="sigma_max"):
        settings(folder, sigma_max=0)
    with pytest.raises(ValueError, match="sigma_max = 80: adapters are sampled as the model that they are added to"):
        SvdConfig.parse(small["SETTINGS"] | goes_on | {"sigma_max": 80, "lora": {"rank": 2}})


def test_adapters_move_alone_and_give_their_model(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file, loaded into the model it was trained on, changes the frames as the weights it stands for do."""
    changes = {"init": str(whole), "lora": {"rank": 2, "alpha": 8.0}, "about": {"name": "moves"}, "lr": 1e-2}
    places = {"latents": str(tmp_path / "latents"), "data": {"toybox": {"count": 3}}, "unet": {}, "image_encoder": {}}
    config = SvdConfig.parse(small["SETTINGS"] | places | changes)
    from reelflow.training.latents import prepare

    prepare(config)
    trainer = make(config, tmp_path / "run")
    base = {name: p.clone() for name, p in trainer.objective.unet.named_parameters() if ".lora_" not in name}
    assert set(trainer.weights) == {f"unet.{name}" for name, _ in trainer.objective.unet.named_parameters() if ".lora_" in name}
    trainer.run()
    assert all(torch.equal(p, base[name]) for name, p in trainer.objective.unet.named_parameters() if ".lora_" not in name)
    path = write_result(trainer)
    assert path == tmp_path / "run" / "moves.safetensors"
    assert all("attn1.to_" in layer for layer in Lora.open(path).layers)
    picture, sampling = render([sample_scene(1, 2)], 1, 64)[0, 0].numpy(), Diffusion(steps=2)
    pipe = reelflow.load(whole, "cpu")
    plain = pipe.animate(picture, seed=1, sampling=sampling)
    pipe.load_lora(path, 0.5)
    pipe.load_lora(path, 0.5)
    adapted = pipe.animate(picture, seed=1, sampling=sampling)
    assert adapted.metadata["settings"]["lora"] == [{"file": "moves.safetensors", "weight": 0.5}] * 2
    from reelflow.adapters.svd import load_parts
    from reelflow.pipelines.svd import SvdPipeline
    from reelflow.training.svd.export import averaged_unet

    merged = SvdPipeline(replace(load_parts(whole), unet=averaged_unet(trainer))).animate(picture, seed=1, sampling=sampling)
    assert np.abs(adapted.frames.astype(int) - merged.frames).max() <= 2
    assert np.abs(adapted.frames.astype(int) - plain.frames).max() > 2
    assert merge(whole, [(Lora.open(path), 1.0)], tmp_path / "merged").name == "tiny-svd-moves"
    compile_ = MagicMock()
    monkeypatch.setattr(SvdPipeline, "compile", compile_)
    pipe.load_lora(path, 0.5)
    compile_.assert_not_called()
    pipe.denoiser.recorded = True  # as `compile` leaves it
    pipe.load_lora(path, 0.5)
    compile_.assert_called_once_with()  # of the other network
    stored = reelflow.load(tmp_path / "merged", "cpu").animate(picture, seed=1, sampling=sampling)
    assert np.abs(stored.frames.astype(int) - merged.frames).max() <= 3, "weights in half precision"
    StableVideoDiffusionPipeline.from_pretrained(tmp_path / "merged")


def test_samples_of_a_run_begin_with_the_pictures_it_names_and_leave_it_as_it_is(folder: Path, whole: Path, tmp_path: Path) -> None:
    picture = tmp_path / "ball.png"
    Image.fromarray(render([sample_scene(1, 2)], 1, 64)[0, 0].numpy()).save(picture)
    trainer = make(settings(folder, sample_every=2, sample_pictures=[str(picture)]), tmp_path / "run")
    trainer.run(on_sample=write_samples)
    assert curve(tmp_path / "run") == curve(whole.parent)
    samples = tmp_path / "run" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == [f"{step:06d}-0.{kind}" for step in (2, 4) for kind in ("mp4", "png")]
    clip, made = Clip.open(samples / "000004-0.mp4"), reelflow.load(whole, "cpu").animate(picture, seed=0)
    assert clip.metadata["settings"] == made.metadata["settings"]
    assert len(clip) == len(made) == 4


# --- bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": None, "data": None}, "nothing to train on; say under data where the clips are, or give latents"),
        ({"unet": {}}, "which UNet? give its settings under unet"),
        ({"rates": [10, 3]}, "rates = [10.0, 3.0]: give two of 3 … 30"),
        ({"shards": 2}, "every rank of svd holds all weights; leave out shards and offload"),
        ({"lora": {}}, "lora adapts a model; say which one with init"),
        ({"sample_every": 5}, "sample_every = 5: clips of which pictures? name files under sample_pictures"),
        ({"sample_pictures": ["nowhere.png"]}, "sample_pictures: no file nowhere.png"),
        ({"flow": {}}, "flow = {}: Extra inputs are not permitted"),
        ({"drop": 0.5}, "drop = 0.5"),
        ({"stages": [{"steps": 1, "buckets": [{"frames": 1, "batch": 1}]}]}, "stages.0.buckets.0.frames = 1"),
    ],
)
def test_settings_that_cannot_be(folder: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="configuration: ") as error:
        settings(folder, **change)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unet": {"widths": [32]}}, "unet: "),
        ({"unet": {"in_channels": 5}}, "unet.in_channels = 5: follows from the other settings (8); leave it out"),
        ({"latents": "nowhere"}, "nowhere: no prepared latents here"),
        ({"vae": "nowhere"}, "nowhere: no VAE here; train one with: python -m reelflow.training.svd.vae"),
        ({"stages": [{"steps": 1, "buckets": [{"frames": 10, "batch": 1}]}]}, "no clips of 10 latent frames for the bucket animate;"),
        ({"about": {"family": "svd", "name": "x", "size": 100}}, "about.size = 100: no multiple of the 8 pixels of a latent place"),
        ({"rates": [5, 30]}, "holds latents that were prepared otherwise (then rates = [3.0, 30.0], now [5.0, 30.0])"),
    ],
)
def test_parts_that_do_not_fit(folder: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        make(settings(folder, **change), tmp_path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(folder: Path, tmp_path: Path) -> None:
    trainer = make(settings(folder), tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.weights.items()}
    rows = trainer.feed(0)
    trainer.feed = lambda step: [rows[0]._replace(x=rows[0].x * float("nan"))]
    with pytest.raises(ValueError, match="step 0: loss nan, grad norm nan: not finite; lower lr"):
        trainer.train_step()
    assert all(torch.equal(p, before[name]) for name, p in trainer.weights.items())
