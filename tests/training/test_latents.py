"""Preparing data: what is written is what the codec gives, once, whatever stops it in between."""

from __future__ import annotations

import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from reelflow.adapters.vae import load_codec
from reelflow.clip import Clip
from reelflow.data.toybox import render, sample_scene
from reelflow.training import latents
from reelflow.training.encoder import Encoder
from reelflow.training.latents import Preparation, prepare
from reelflow.training.shards import PreparedLatents, shard_path

FOLDER = Path(__file__).parents[2] / "src/reelflow/weights/mini/vae"
configure = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["configure"]


@pytest.fixture(autouse=True)
def _small(_seeded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards of few samples."""
    monkeypatch.setattr(latents, "SHARD", 3)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tiny_model: Path, recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it prepared without a stop, three samples a shard."""
    folder = tmp_path_factory.mktemp("whole") / "latents"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "SHARD", 3)
        prepare(configure(tiny_model, recorded, folder))
    return folder


@torch.no_grad()
def test_encoder_is_the_vae_and_its_bfloat16_is_close() -> None:
    vae = AutoencoderKLWan.from_pretrained(FOLDER).eval()
    frames = render([sample_scene(3, 0), sample_scene(3, 1)], 9)
    mean, std = (torch.tensor(values).view(1, 1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    posterior = vae.encode(frames.permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist
    expected = (posterior.mode().transpose(1, 2) - mean) / std
    exact = Encoder(FOLDER, exact=True)
    found = exact.posterior(frames)
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], posterior.std.transpose(1, 2), atol=1e-4, rtol=1e-3)
    exact.one_pass = None  # as on a GPU, and for large clips
    torch.testing.assert_close(exact.posterior(frames), found, atol=1e-4, rtol=1e-3)
    assert (Encoder(FOLDER)(frames) - expected).square().mean().sqrt() < 0.02


def test_prepared_latents_are_the_codecs(whole: Path, tiny_model: Path, recorded: Path) -> None:
    codec, prepared = load_codec(tiny_model / "vae"), PreparedLatents(whole)
    assert [(Path(entry.key).name, entry.captions, entry.aspect, entry.frames, entry.edit) for entry in prepared.entries] == [
        (f"{index}.{'png' if index == 7 else 'mp4'}", (f"clip {index}",), "16:9" if index < 3 else "1:1", 1 if index == 7 else 3, False)
        for index in range(8)
    ]
    for entry in (prepared.entries[index] for index in (0, 3, 7)):  # wide, longer than is taken, a still
        frames = Clip.open(recorded.parent / entry.key).resized(*((48, 80) if entry.aspect == "16:9" else (64, 64))).frames
        length = 1 if entry.frames == 1 else 9
        mean, std = prepared.read(entry, 0, entry.frames)
        starts = range(len(frames) - length + 1)
        wanted = [codec.posterior(torch.from_numpy(frames[None, start : start + length])) for start in starts]
        near = [torch.allclose(mean, one[0], atol=2e-2, rtol=1e-2) and torch.allclose(std, one[1], rtol=1e-2) for one in wanted]
        assert sum(near) == 1, f"{entry.key}: at exactly one place of the clip"
    first = prepared.entries[0]
    torch.testing.assert_close(prepared.read(first, 1, 2)[0], prepared.read(first, 0, 3)[0][:, 1:], atol=0, rtol=0)


def test_every_row_says_how_far_it_is(tiny_model: Path, recorded: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    found = prepare(configure(tiny_model, recorded, tmp_path / "latents"), rows.append)
    assert [(row["clips"], row["failed"]) for row in rows] == [(3, 0), (6, 0), (8, 0)]
    assert [row["done"] for row in rows] == [0.375, 0.75, 1.0]
    assert rows[-1]["seconds_left"] == 0
    assert found == {"clips": 8, "failed": 0, "shards": 3, "done": 1.0, "seconds_left": 0}
    again = prepare(configure(tiny_model, recorded, tmp_path / "latents"), rows.append)
    assert again == found
    assert len(rows) == 3, "nothing was left to do"


class KilledError(BaseException):
    pass


@pytest.mark.parametrize(("moment", "left"), [("before", 1), ("after", 2)])
def test_stopped_anywhere_the_result_is_the_same(
    tiny_model: Path, recorded: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, left: int
) -> None:
    """Before or after the second shard has its name, with what a process that is killed leaves behind."""
    config, real, folder = configure(tiny_model, recorded, tmp_path / "latents"), os.replace, tmp_path / "latents"

    def replace(source: Path, target: Path) -> None:
        if target.name == "00000-0001.safetensors" and moment == "before":
            raise KilledError
        real(source, target)
        if target.name == "00000-0001.safetensors":
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KilledError):
            prepare(config)
    assert len(list(folder.glob("0*.safetensors"))) == left, "whole shards stay"
    (folder / f".{shard_path(folder, 0, left).name}.123.partial").write_bytes(b"half of it")
    prepare(config)
    assert files(folder) == files(whole)


KILLED = """
import os, signal, sys
from reelflow.training import latents
from reelflow.training.config import TrainConfig
latents.SHARD = 3
real = os.replace
def replace(source, target):
    if str(target).endswith("00000-0001.safetensors"): os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
latents.prepare(TrainConfig.load(sys.argv[1]))
"""


@pytest.mark.slow
def test_killed_and_started_again_the_result_is_the_same(tiny_model: Path, recorded: Path, whole: Path, tmp_path: Path) -> None:
    config = configure(tiny_model, recorded, tmp_path / "latents")
    (tmp_path / "run.yaml").write_text(config.model_dump_json(), encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, tmp_path / "run.yaml"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "latents").glob("0*.safetensors")] == ["00000-0000.safetensors"]
    prepare(config)
    assert files(tmp_path / "latents") == files(whole)


def test_ranks_share_the_parts(tiny_model: Path, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "more" / str(index) for index in range(3)]
    for folder in folders:
        shutil.copytree(recorded, folder)
    data = {"folder": [str(folder) for folder in folders]}
    alone, pair = (configure(tiny_model, recorded, tmp_path / name, data) for name in ("alone", "pair"))
    prepare(alone)
    second = Preparation(pair, rank=1, ranks=2).run()
    assert second["clips"] == 8
    assert sorted(path.name[:5] for path in (tmp_path / "pair").glob("*.safetensors")) == ["00001"] * 3
    assert Preparation(pair, rank=0, ranks=2).run() == {"clips": 24, "failed": 0, "shards": 9, "done": 1.0, "seconds_left": 0}
    assert files(tmp_path / "pair") == files(tmp_path / "alone")


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_shards_before(tiny_model: Path, recorded: Path, whole: Path, tmp_path: Path) -> None:
    config = configure(tiny_model, recorded, tmp_path / "latents")
    with ExitStack() as stack:

        def fills(row: dict[str, Any]) -> None:
            stack.enter_context(full_disk(500))

        with pytest.raises(ValueError, match=r"00000-0001\.safetensors: cannot be written \(.*; the shards before it stay good") as error:
            prepare(config, fills)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "latents").iterdir() if path.suffix != ".json"] == ["00000-0000.safetensors"]
    prepare(config)
    assert files(tmp_path / "latents") == files(whole)


def test_what_cannot_be_used_is_left_out_and_named(tiny_model: Path, clips: Path, tmp_path: Path) -> None:
    (clips / "1.txt").unlink()
    (clips / "2.mp4").write_bytes(b"broken")
    Clip(np.zeros((5, 64, 64, 3), np.uint8), 8).save(clips / "4.mp4")
    config = configure(tiny_model, clips, tmp_path / "latents", {"max_failed_share": 0.5})
    for _ in range(2):
        found = prepare(config)
        assert (found["clips"], found["failed"]) == (5, 3)
        rows = [json.loads(line) for line in (tmp_path / "latents" / "failures.jsonl").read_text().splitlines()]
        assert {Path(row["key"]).name: row["reason"] for row in rows} == {
            "1.mp4": "without a caption", "2.mp4": "that cannot be decoded", "4.mp4": "too short",
        }  # fmt: skip
    entries = PreparedLatents(tmp_path / "latents").entries
    assert [Path(entry.key).stem for entry in entries] == ["0", "3", "5", "6", "7"]
    shorter = configure(tiny_model, clips, tmp_path / "shorter", {"max_failed_share": 0.5, "min_frames": 5})
    assert prepare(shorter)["clips"] == 6
    assert [entry.frames for entry in PreparedLatents(tmp_path / "shorter").entries if Path(entry.key).stem == "4"] == [2]


def test_too_many_failures_stop_and_stopping_again_is_the_same(tiny_model: Path, clips: Path, tmp_path: Path) -> None:
    for index in (1, 2):
        (clips / f"{index}.mp4").write_bytes(b"broken")
    config = configure(tiny_model, clips, tmp_path / "latents", {"max_failed_share": 0.2})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"2 \(2 that cannot be decoded: .*1\.mp4, .*2\.mp4\) of 8 clips cannot be used, more than"):
            prepare(config)
        assert len((tmp_path / "latents" / "failures.jsonl").read_text().splitlines()) == 2


def test_nothing_usable(tiny_model: Path, clips: Path, tmp_path: Path) -> None:
    for path in [*clips.glob("*.mp4"), *clips.glob("*.png")]:
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="not one of 8 clips can be used"):
        prepare(configure(tiny_model, clips, tmp_path / "latents", {"max_failed_share": 1}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"crop": "random"}}, "then data.crop = centre, now random"),
        ({"data": {"min_frames": 5}}, "then data.min_frames = None, now 5"),
        ({"seed": 1}, "then seed = 0, now 1"),
        ({"precision": "bfloat16"}, "then precision = float32, now bfloat16"),
        ({"vae": str(FOLDER)}, "the codec was another"),
    ],
)
def test_a_folder_of_other_latents_is_refused(
    tiny_model: Path, recorded: Path, whole: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    shutil.copytree(whole, tmp_path / "latents")
    with pytest.raises(ValueError, match="holds latents that were prepared otherwise") as error:
        prepare(configure(tiny_model, recorded, tmp_path / "latents", **change))
    assert words in str(error.value)


def test_clips_that_changed_are_refused(tiny_model: Path, clips: Path, tmp_path: Path) -> None:
    config = configure(tiny_model, clips, tmp_path / "latents")
    prepare(config)
    prepare(config.model_copy(update={"data": config.data.model_copy(update={"workers": 1})}))
    (clips / "3.txt").write_text("another caption")
    with pytest.raises(ValueError, match="the clips or captions were others"):
        prepare(config)


def test_a_damaged_shard_is_named(tiny_model: Path, recorded: Path, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "latents"))
    path = shard_path(folder, 0, 1)
    path.write_bytes(path.read_bytes()[:-10])
    for use in (lambda: PreparedLatents(folder), lambda: prepare(configure(tiny_model, recorded, folder))):
        with pytest.raises(ValueError, match=r"00000-0001\.safetensors: damaged \(.*\); remove it and run reelflow train prepare again"):
            use()
    path.unlink()
    prepare(configure(tiny_model, recorded, folder))
    assert files(folder) == files(whole)


def test_progress_inside_a_tar_file_goes_by_its_bytes(tiny_model: Path, recorded: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for path in sorted(recorded.iterdir()):
            tar.add(path, path.name)
    rows: list[dict[str, Any]] = []
    prepare(configure(tiny_model, recorded, tmp_path / "latents", {"folder": [], "shards": str(tmp_path / "0.tar")}), rows.append)
    assert [row["clips"] for row in rows] == [3, 6, 8]
    assert 0.2 < rows[0]["done"] < rows[1]["done"] < rows[2]["done"] == 1


def test_several_crops_of_a_clip(tiny_model: Path, recorded: Path, tmp_path: Path) -> None:
    prepare(configure(tiny_model, recorded, tmp_path / "latents", {"crops": 3, "posterior": "mean"}))
    prepared = PreparedLatents(tmp_path / "latents")
    keys = [Path(entry.key).name for entry in prepared.entries]
    assert [keys.count(f"{index}.mp4") for index in range(7)] == [3] * 7
    assert keys.count("7.png") == 1
    long = [prepared.read(entry, 0, 3) for entry in prepared.entries if Path(entry.key).name == "1.mp4"]
    assert not torch.equal(long[0][0], long[1][0])
    assert long[0][1] is None, "means alone"


def test_toybox_is_prepared_like_any_other(tiny_model: Path, tmp_path: Path) -> None:
    data = {"toybox": {"count": 2, "pictures": 1, "edits": 1, "seed": 5}, "posterior": "mean"}
    config = configure(tiny_model, tmp_path, tmp_path / "latents", {**data, "folder": []})
    assert prepare(config)["clips"] == 4
    prepared = PreparedLatents(tmp_path / "latents")
    assert [(entry.frames, entry.edit) for entry in prepared.entries] == [(3, False), (3, False), (1, False), (2, True)]
    wanted = Encoder(tiny_model / "vae", exact=True)(render([sample_scene(5 + 9000, 1)], 9, 64))
    torch.testing.assert_close(prepared.read(prepared.entries[1], 0, 3)[0], wanted, atol=1e-2, rtol=1e-2)
    assert prepared.read(prepared.entries[3], 0, 2)[0].shape == (2, 2, 8, 4, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": None, "latents": "x"}, "nothing to prepare"),
        ({"latents": None}, "nowhere to put latents"),
        ({"data": {"frames": 10}}, "frames = 10: must be 1 + 4k"),
        ({"data": {"text_states": True}, "train_text": True}, "data.text_states needs a text encoder that stays as it is"),
    ],
)
def test_configurations_that_cannot_be_prepared(
    tiny_model: Path, recorded: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    data = change.pop("data", {})
    config = configure(tiny_model, recorded, change.pop("latents", tmp_path / "x"), data, **change)
    with pytest.raises(ValueError, match="nothing|nowhere|1 \\+ 4k|text_states") as error:
        prepare(config.model_copy(update={"data": None}) if data is None else config)
    assert words in str(error.value)
