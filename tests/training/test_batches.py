"""Batches: a function of seed and step, every clip once an epoch, one task, length and aspect each, prepared or raw."""

from __future__ import annotations

import json
import math
import runpy
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from reelflow.adapters.text import TextEncoder, load_text_encoder
from reelflow.training.batches import Batch, CachedLatents, PreparedText, PromptPlanner, needed
from reelflow.training.config import TrainConfig
from reelflow.training.latents import prepare
from reelflow.training.parallel import Ranks
from reelflow.training.raw import RawClips
from reelflow.training.run import open_source
from reelflow.training.shards import Entry, PreparedLatents, shard_path

configure = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["configure"]
SOURCES = ("prepared", "raw")
ALONE = Ranks(torch.device("cpu"))


@pytest.fixture(scope="module")
def latents(tiny_model: Path, recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything prepared, with text states."""
    folder = tmp_path_factory.mktemp("prepared") / "latents"
    prepare(configure(tiny_model, recorded, folder, {"text_states": True}))
    return folder


@pytest.fixture
def settings(tiny_model: Path, recorded: Path, latents: Path) -> dict[str, TrainConfig]:
    data = {"text_states": True}
    return {"prepared": configure(tiny_model, recorded, latents, data), "raw": configure(tiny_model, recorded, None, data)}


def equal(found: Batch, wanted: Batch) -> bool:
    return found.prompts == wanted.prompts and all(map(torch.equal, found.latents, wanted.latents))


def plans(config: TrainConfig, entries: list[Entry], steps: int) -> list[Any]:
    planner = PromptPlanner(config, entries, "here")
    return [planner.plan(step) for step in range(steps)]


def entry(index: int, frames: int = 3, aspect: str = "1:1", edit: bool = False) -> Entry:
    return Entry(f"clip {index}", (f"caption {index}",), aspect, frames, edit, row=index)


def test_the_examples_are_configurations() -> None:
    examples = Path(__file__).parents[2] / "examples"
    for name in ("mini", "folder"):
        assert TrainConfig.load(examples / f"{name}.yaml").data is not None


# ----------------------------------------------------------------------------------------------------------------------- plans


def test_every_clip_once_an_epoch_in_another_order(settings: dict[str, TrainConfig]) -> None:
    config = settings["raw"].model_copy(update={"stages": settings["raw"].stages[:1]})
    entries = [entry(index, frames=1 + index % 4) for index in range(10)]
    planner, drawn = PromptPlanner(config, entries, "here"), dict[int, list[str]]()
    for step in range(80):
        plan = planner.plan(step)
        for draw in plan.draws:
            found, _ = next(planner.draw(plan.bucket, plan.aspect, draw))
            drawn.setdefault(needed(plan.bucket), []).append(found.key)
    for least, keys in drawn.items():
        usable = sum(e.frames >= least for e in entries)
        epochs = [tuple(keys[start : start + usable]) for start in range(0, len(keys) - usable + 1, usable)]
        assert len(epochs) > 3
        assert all(len(set(epoch)) == usable for epoch in epochs)
        assert len(set(epochs)) > 1
    assert drawn.keys() == {1, 3}


def test_plans_do_not_depend_on_what_was_asked_before(settings: dict[str, TrainConfig]) -> None:
    entries = [entry(index, aspect="16:9" if index % 3 else "1:1") for index in range(10)]
    wanted = plans(settings["raw"], entries, 30)
    planner = PromptPlanner(settings["raw"], entries, "here")
    assert [planner.plan(step) for step in (29, 3, 17)] == [wanted[29], wanted[3], wanted[17]]
    assert plans(settings["raw"].model_copy(update={"seed": 1}), entries, 30) != wanted


def test_aspects_come_as_often_as_their_clips(settings: dict[str, TrainConfig]) -> None:
    entries = [entry(index, aspect="16:9" if index < 3 else "1:1") for index in range(12)]
    counts = Counter(plan.aspect for plan in plans(settings["raw"], entries, 400))
    assert counts["16:9"] / 400 == pytest.approx(0.25, abs=0.06)


def test_buckets_come_by_their_shares(tiny_model: Path, recorded: Path) -> None:
    buckets = [{"task": "image", "batch": 1, "share": 0.2}, {"task": "generate", "frames": 3, "batch": 1, "share": 0.8}]
    config = configure(tiny_model, recorded, None, stages=[{"steps": 1, "buckets": buckets}])
    counts = Counter(plan.bucket.task for plan in plans(config, [entry(0)], 400))
    assert counts["image"] / 400 == pytest.approx(0.2, abs=0.06)


def test_a_bucket_without_clips_that_long(settings: dict[str, TrainConfig]) -> None:
    with pytest.raises(ValueError, match="here: no clips of 3 latent frames for the bucket generate; the longest has 2"):
        PromptPlanner(settings["raw"], [entry(0, frames=2)], "here")
    with pytest.raises(ValueError, match="no clips of 3 latent frames for the bucket generate; there are no clips"):
        PromptPlanner(settings["raw"], [entry(0, edit=True)], "here")


# --------------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("kind", SOURCES)
def test_a_batch_follows_from_the_step(settings: dict[str, TrainConfig], tmp_path: Path, kind: str) -> None:
    """Steps in order, as a run asks, and any other way, as one that is resumed does: bit by bit the same."""
    first, second = (open_source(settings[kind], tmp_path, ALONE) for _ in range(2))
    wanted = [first(step) for step in range(6)]
    assert {len(batch.prompts) for batch in wanted} == {2, 3}
    for step in (4, 5, 1):
        assert equal(second(step), wanted[step])
    assert not equal(wanted[0], wanted[1])
    for source in (first, second):
        source.close()


@pytest.mark.parametrize("kind", SOURCES)
def test_rows_have_the_shape_of_their_aspect(settings: dict[str, TrainConfig], tmp_path: Path, kind: str) -> None:
    source = open_source(settings[kind], tmp_path, ALONE)
    shapes = set()
    for step in range(20):
        batch = source(step)
        plan = source.planner.plan(step)
        place = {"1:1": (4, 4), "16:9": (3, 5)}[plan.aspect]
        assert {tuple(row.shape) for row in batch.latents} == {(plan.bucket.frames, 8, *place)}
        assert all(f"in a {plan.aspect} aspect ratio" in prompt for prompt in batch.prompts)
        assert all(prompt.startswith("An image:" if plan.bucket.task == "image" else "A video with 8 fps:") for prompt in batch.prompts)
        assert all(("\n(extend) clip" in prompt) == (plan.bucket.task == "extend") for prompt in batch.prompts)
        shapes.add((plan.bucket.task, plan.aspect))
    assert len(shapes) == 6
    source.close()


def test_raw_and_prepared_latents_are_the_same(tiny_model: Path, recorded: Path, tmp_path: Path) -> None:
    """Of clips that are as long as they are prepared, by their means; only bfloat16 on the disk between them."""
    for path in recorded.iterdir():
        if path.stem in "0246":
            (tmp_path / "clips").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "clips")
    bucket = [{"task": "generate", "frames": 3, "batch": 2}, {"task": "extend", "frames": 2, "batch": 1}]
    stages = [{"steps": 9, "buckets": bucket}]
    prepared = configure(tiny_model, tmp_path / "clips", tmp_path / "latents", {"posterior": "mean"}, stages=stages)
    prepare(prepared)
    first = CachedLatents(prepared)
    second = RawClips(prepared.model_copy(update={"latents": None}), tmp_path)
    for step in range(9):
        found, wanted = second(step), first(step)
        assert found.prompts == wanted.prompts
        for row, other in zip(found.latents, wanted.latents, strict=True):
            torch.testing.assert_close(row, other, atol=2e-2, rtol=1e-2)
    second.close()


def test_latents_are_drawn_anew_from_the_posterior_and_scaled(settings: dict[str, TrainConfig]) -> None:
    source = CachedLatents(settings["prepared"])
    errors = []
    for step in range(30):
        plan, batch = source.planner.plan(step), source(step)
        if plan.bucket.task != "generate":
            continue
        for draw, row in zip(plan.draws, batch.latents, strict=True):
            mean, std = source.prepared.read(next(source.planner.draw(plan.bucket, plan.aspect, draw))[0], 0, 3)
            assert std is not None
            scale = torch.tensor([1, 0.6, 0.6]).view(-1, 1, 1, 1)
            errors.append(((row / scale - mean[0]) / std[0]).flatten())
    noise = torch.cat(errors)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert noise.mean().abs().item() < 0.05
    assert not torch.equal(errors[0], errors[1])


def test_means_cannot_be_drawn_from(tiny_model: Path, recorded: Path, tmp_path: Path) -> None:
    mean, sample = ({"posterior": kind} for kind in ("mean", "sample"))
    prepare(configure(tiny_model, recorded, tmp_path / "latents", mean))
    with pytest.raises(ValueError, match="holds means without deviations; use data.posterior=mean"):
        CachedLatents(configure(tiny_model, recorded, tmp_path / "latents", sample))(0).latents[0]
    without = configure(tiny_model, recorded, tmp_path / "latents").model_copy(update={"data": None})
    assert CachedLatents(without)(0).latents[0].isfinite().all()


def test_an_extension_begins_anywhere_but_at_the_first_frame(tiny_model: Path, recorded: Path, tmp_path: Path) -> None:
    values = torch.arange(6).view(1, 6, 1, 1, 1).repeat(1, 1, 8, 4, 4).to(torch.bfloat16)
    old_shard(tmp_path / "clips-021-00000.safetensors", {"latents": values}, [["x"]])
    config = configure(tiny_model, recorded, tmp_path).model_copy(update={"data": None})
    source, starts = CachedLatents(config), set()
    for step in range(60):
        if source.planner.plan(step).bucket.task == "extend":
            for row in source(step).latents:
                starts.add(round(row[0].mean().item() / 0.6))
                assert row[1].mean().item() == pytest.approx(row[0].mean().item() + 0.6)
    assert starts == {1, 2, 3, 4}


# -------------------------------------------------------------------------------------------------------- what was cached before


def old_shard(path: Path, tensors: dict[str, torch.Tensor], captions: list[list[str]]) -> None:
    header = {"kind": path.name.split("-")[0], "frames": "9", "seed": "0", "first": "0", "captions": json.dumps(captions)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, header)


def test_shards_of_the_first_format_are_read(tiny_model: Path, recorded: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    clips, short, source, target = (
        torch.randn(3, frames, 8, 4, 4, generator=generator).to(torch.bfloat16) for frames in (3, 1, 2, 2)
    )  # fmt: skip
    old_shard(tmp_path / "clips-009-00000.safetensors", {"latents": clips}, [["a", "b"], ["c"], ["d"]])
    old_shard(tmp_path / "clips-001-00000.safetensors", {"latents": short}, [["e"], ["f"], ["g"]])
    old_shard(tmp_path / "edits-005-00000.safetensors", {"source": source, "target": target}, [["h"], ["i"], ["j"]])
    prepared = PreparedLatents(tmp_path)
    assert [(e.captions, e.frames, e.edit) for e in prepared.entries] == [
        (("e",), 1, False), (("f",), 1, False), (("g",), 1, False), (("a", "b"), 3, False), (("c",), 3, False), (("d",), 3, False),
        (("h",), 2, True), (("i",), 2, True), (("j",), 2, True),
    ]  # fmt: skip
    torch.testing.assert_close(prepared.read(prepared.entries[4], 1, 2)[0][0], clips[1, 1:].float(), atol=0, rtol=0)
    torch.testing.assert_close(prepared.read(prepared.entries[8], 0, 2)[0], torch.stack((source[2], target[2])).float(), atol=0, rtol=0)
    buckets = [{"task": "edit", "frames": 2, "batch": 2}, {"task": "generate", "frames": 3, "batch": 2}]
    config = configure(tiny_model, recorded, tmp_path, stages=[{"steps": 9, "buckets": buckets}]).model_copy(update={"data": None})
    source_of = CachedLatents(config)
    for step in range(9):
        assert {len(row) for row in source_of(step).latents} == {4 if source_of.planner.plan(step).bucket.task == "edit" else 3}
    with pytest.raises(ValueError, match="holds latents of an earlier version, which can be trained on"):
        prepare(configure(tiny_model, recorded, tmp_path))


def test_drifted_edits_are_learned_where_they_begin_and_turn_back(tiny_model: Path, recorded: Path, tmp_path: Path) -> None:
    places = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(4, 5, 8, 4, 4)
    old_shard(tmp_path / "edits-017-00000.safetensors", {"source": places, "target": places + 8}, [["a"], ["b"], ["c"], ["d"]])

    def batches(**bucket: Any) -> list[tuple[list[list[float]], torch.Tensor | None]]:
        stages = [{"steps": 9, "denoiser": False, "buckets": [{"task": "edit", "frames": 5, "batch": 4} | bucket]}]
        config = configure(tiny_model, recorded, tmp_path, stages=stages).model_copy(update={"data": None})
        source_of = CachedLatents(config)
        found = [source_of(step) for step in range(9)]
        assert equal(source_of(0), found[0]), "a function of the step"
        scale = torch.tensor([1.0, *4 * [config.about.latent_scale]] * 2)
        return [([(row[:, 0, 0, 0] / scale).round().tolist() for row in batch.latents], batch.learned_BF) for batch in found]

    source, target = [0, 1, 2, 3, 4], [8, 9, 10, 11, 12]
    assert all(rows == 4 * [source + target] and learned is None for rows, learned in batches())
    went = []
    for rows, learned in batches(drifted=True):
        assert learned is not None
        for row, counts in zip(rows, learned.tolist(), strict=True):
            first = 10 - counts[:5:-1].index(0) if 0 in counts[6:] else 6
            assert 6 <= first <= 9
            assert counts == 5 * [0] + [1] + (first - 6) * [0] + (10 - first) * [1]
            assert row[:6] == [*source, 8], "the source and the first frame are as they are"
            assert row[first:] == target[first - 5 :], "as is what is learned"
            assert row[6:first] == sorted(row[6:first])
            went.append(row[6:first] == target[1 : first - 5])
    assert 0.2 < sum(went) / len(went) < 0.8


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"buckets": [{"task": "generate", "frames": 2, "batch": 2, "drifted": True}]}, "drifted is for buckets of the task edit"),
        ({"buckets": [{"task": "edit", "frames": 2, "batch": 2, "drifted": True}], "denoiser": True}, "cannot train the denoiser"),
    ],
)
def test_where_edits_cannot_drift(tiny_model: Path, recorded: Path, tmp_path: Path, stage: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(tiny_model, recorded, tmp_path, stages=[{"steps": 9, "denoiser": False} | stage])


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prepared latents here; make them with: reelflow train prepare"):
        PreparedLatents(tmp_path)
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a shard of prepared latents; remove it"):
        PreparedLatents(tmp_path)


def test_latents_of_another_codec_are_refused(tiny_model: Path, recorded: Path, tmp_path: Path) -> None:
    old_shard(tmp_path / "clips-009-00000.safetensors", {"latents": torch.zeros(1, 3, 5, 4, 4)}, [["a"]])
    with pytest.raises(ValueError, match="latents of 5 channels, flow.channels is 8"):
        CachedLatents(configure(tiny_model, recorded, tmp_path))


def test_frames_of_another_size_than_the_embedding_are_refused(tiny_model: Path, recorded: Path, tmp_path: Path) -> None:
    old_shard(tmp_path / "clips-009-00000.safetensors", {"latents": torch.zeros(1, 3, 8, 4, 4)}, [["a"]])
    config = configure(tiny_model, recorded, tmp_path, {"posterior": "mean"})
    placed = config.model_copy(update={"flow": config.flow.model_copy(update={"learned_places": 20})})
    CachedLatents(config)(0).latents[0]
    with pytest.raises(ValueError, match="latents of 4 × 4 places, flow.learned_places is 20"):
        CachedLatents(placed)(0).latents[0]


def test_latents_for_another_model_are_refused(settings: dict[str, TrainConfig]) -> None:
    config = settings["prepared"]
    other = config.model_copy(update={"about": config.about.model_copy(update={"size": 128})})
    with pytest.raises(ValueError, match=r"prepared otherwise \(then about\.size = 64, now 128\)"):
        CachedLatents(other)


def test_what_is_not_all_prepared_is_said(settings: dict[str, TrainConfig], latents: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(latents, tmp_path / "latents"))
    manifest = json.loads((folder / "prepared.json").read_text())
    (folder / "prepared.json").write_text(json.dumps(manifest | {"parts": 3}))
    with pytest.warns(UserWarning, match="2 parts of the data are not prepared yet"):
        open_source(settings["prepared"].model_copy(update={"latents": folder}), tmp_path, ALONE)


# ----------------------------------------------------------------------------------------------------------------- text states


def test_prepared_text_states_are_the_encoders(settings: dict[str, TrainConfig], tiny_model: Path) -> None:
    config = settings["prepared"]
    source = CachedLatents(config)
    encoder = load_text_encoder(tiny_model / "text_encoder", tiny_model / "tokenizer", config.flow.text_tokens)
    text = source.with_texts(encoder)
    assert isinstance(text, PreparedText)
    for step in range(6):
        prompts = source(step).prompts
        assert all(source.prepared.text(prompt) is not None for prompt in prompts)
        torch.testing.assert_close(text.states(prompts), encoder.states(prompts), atol=1e-5, rtol=1e-4)
    mixed = ["never seen", source(0).prompts[0]]
    assert source.prepared.text("never seen") is None
    torch.testing.assert_close(text.states(mixed), encoder.states(mixed), atol=1e-5, rtol=1e-4)


def test_what_was_prepared_is_not_computed(settings: dict[str, TrainConfig], tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = CachedLatents(settings["prepared"])
    text = source.with_texts(load_text_encoder(tiny_model / "text_encoder", tiny_model / "tokenizer", 48))

    def fails(*_: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(TextEncoder, "states", fails)
    assert text.states(source(0).prompts).shape[1:] == (48, 16)
    with pytest.raises(AssertionError, match="computed"):
        text.states(["never seen"])


# ------------------------------------------------------------------------------------------------------------------- raw clips


def test_a_clip_that_breaks_is_replaced_and_named(tiny_model: Path, clips: Path, tmp_path: Path) -> None:
    """Its header and first frame are whole, so that only decoding finds out."""
    config = configure(tiny_model, clips, None, {"max_failed_share": 0.3})
    whole = (clips / "5.mp4").read_bytes()
    place = whole.rindex(b"mdat") + 4
    source = RawClips(config, tmp_path / "run")
    (clips / "5.mp4").write_bytes(whole[:place] + bytes(len(whole) - place))
    found = [source(step) for step in range(12)]
    assert source.failures.count == 1
    row = json.loads((tmp_path / "run" / "failures.jsonl").read_text())
    assert (Path(row["key"]).name, row["reason"]) == ("5.mp4", "that cannot be decoded")
    assert source.failures.judged == 8
    source.close()
    assert all(math.isfinite(row.sum().item()) for batch in found for row in batch.latents)


def test_unusable_clips_are_left_out_or_stop_the_run(tiny_model: Path, clips: Path, tmp_path: Path) -> None:
    (clips / "1.txt").unlink()
    (clips / "2.mp4").write_bytes(b"broken")
    source = RawClips(configure(tiny_model, clips, None, {"max_failed_share": 0.3}), tmp_path / "run")
    assert {Path(e.key).name for e in source.planner.entries} == {f"{i}.mp4" for i in (0, 3, 4, 5, 6)} | {"7.png"}
    source.close()
    with pytest.raises(ValueError, match=r"2 \(1 without a caption: .*1\.mp4; 1 that cannot be decoded: .*2\.mp4\) of 8 clips"):
        RawClips(configure(tiny_model, clips, None), tmp_path / "run")


def test_a_rank_decodes_its_own_rows_and_sees_the_same(
    settings: dict[str, TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = RawClips(settings["raw"], tmp_path)
    monkeypatch.setattr(RawClips, "_measured", lambda self: list(alone.measures.values()))
    second = RawClips(settings["raw"], tmp_path, rank=1, ranks=2)
    asked: list[tuple[int, int]] = []
    real = RawClips._piece
    monkeypatch.setattr(RawClips, "_piece", lambda self, plan, row: asked.append((plan.step, row)) or real(self, plan, row))
    for step in range(3):
        batch, wanted = second(step), alone(step)
        asked[:] = [pair for pair in asked if pair[0] != step]
        torch.testing.assert_close(batch.latents[1], wanted.latents[1], atol=1e-5, rtol=1e-4)
        assert asked == [pair for pair in asked if pair[0] != step], "it was decoded ahead"
        torch.testing.assert_close(batch.latents[0], wanted.latents[0], atol=1e-5, rtol=1e-4)
    for source in (alone, second):
        source.close()


def test_a_stream_is_prepared_or_copied_first(tiny_model: Path, recorded: Path, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "0.tar.gz", "w:gz") as tar:
        for path in sorted(recorded.iterdir()):
            tar.add(path, path.name)
    data: dict[str, Any] = {"shards": str(tmp_path / "0.tar.gz"), "folder": []}
    with pytest.raises(ValueError, match=r"0\.tar\.gz.*: comes as a stream.*; run reelflow train prepare, or name a folder for a copy"):
        RawClips(configure(tiny_model, recorded, None, data), tmp_path)
    source = RawClips(configure(tiny_model, recorded, None, data | {"cache": str(tmp_path / "cache")}), tmp_path)
    straight = RawClips(configure(tiny_model, recorded, None), tmp_path)
    assert source(3).prompts == straight(3).prompts
    assert [row.shape for row in source(3).latents] == [row.shape for row in straight(3).latents]
    source.close()
    straight.close()
    prepare(configure(tiny_model, recorded, tmp_path / "latents", data))
    assert shard_path(tmp_path / "latents", 0, 0).exists()
