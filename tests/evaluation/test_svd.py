"""What is measured of Stable Video Diffusion: a pipeline that shows true renders gets full marks, and one that does not does not."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from reelflow.clip import Clip
from reelflow.data.toybox import COLOURS, FPS, render
from reelflow.evaluation import toybox, toybox_svd
from reelflow.evaluation.svd import arithmetic, measure, table
from reelflow.pipelines.svd import Diffusion, SvdPipeline
from reelflow.pipelines.svd.settings import USUAL

tiny = runpy.run_path(str(Path(__file__).parent.parent / "pipelines" / "svd_tiny.py"))


@pytest.fixture(autouse=True)
def _one_thread(_seeded: None) -> None:
    torch.set_num_threads(1)


class Perfect(SvdPipeline):
    """Knows the scenes of the pictures it is shown, and sets them in motion as asked; what `spoil` says, it gets wrong."""

    spoil = ""

    def animate_batch(
        self, images: Sequence[Any], seeds: Sequence[int], prompt: str = "", seconds: float | None = None, frames: int | None = None,
        size: tuple[int, int] | None = None, sampling: Diffusion = USUAL, progress: Any = None,
    ) -> list[Clip]:  # fmt: skip
        known = [scene for split in ("train", "held_out") for scene in toybox_svd.pictured(16, split)]
        by_picture = {render([scene], 1, 64)[0, 0].numpy().tobytes(): scene for scene in known}
        found = []
        for image in images:
            scene = by_picture[np.asarray(image).tobytes()]
            pace = FPS / (sampling.fps or 7) * (0.5 if self.spoil == "motion" else sampling.motion / 127)
            if self.spoil == "colour":
                other = next(colour for colour in COLOURS if colour != scene.things[0].colour)
                scene = scene.with_thing(0, colour=other)
            clip = render([scene], frames or 14, 64, pace=min(pace, 4))[0].numpy().copy()
            if self.spoil == "end":
                clip[-1] = clip[-1, :1, :1]
            found.append(Clip(clip, 7))
        return found


@pytest.fixture(scope="module")
def perfect() -> Perfect:
    parts = tiny["tiny_parts"]()
    object.__setattr__(parts, "about", parts.about.model_copy(update={"frames": 14}))
    return Perfect(parts)


def quiet(share: float) -> None:
    pass


def test_true_clips_get_full_marks(perfect: Perfect) -> None:
    perfect.spoil = ""
    found = toybox_svd.run(perfect, count=8)
    for name in ("kept", "held_out"):
        assert found[name]["thing_kept"] >= 0.75, found[name]  # the detector sees 64 × 64 pixels
        assert found[name]["above_28_db"] == 1
        assert found[name]["codec_psnr"] < 20, "of random weights"
    assert (found["motion_in_order"], found["fps_in_order"]) == (True, True)
    assert list(found["motion"]) == ["32", "64", "127", "190", "255"]


@pytest.mark.parametrize("spoil", ["colour", "end"])
def test_what_is_wrong_is_noticed(perfect: Perfect, spoil: str) -> None:
    perfect.spoil = spoil
    found = toybox_svd.kept(perfect, toybox_svd.pictured(8, "train"), 0, 8, USUAL, quiet)
    assert found["thing_kept"] < 0.2
    assert (found["above_28_db"] < 1) is (spoil == "colour")
    assert (found["colour"] < 0.2) is (spoil == "colour")
    assert (found["there"] < 0.2) is (spoil == "end")


def test_motion_that_does_not_follow_is_noticed(perfect: Perfect) -> None:
    perfect.spoil = "motion"
    scenes = toybox_svd.pictured(4, "train")
    slow, fast = (toybox_svd.moved(perfect, scenes, 0, 4, Diffusion(motion=motion), quiet) for motion in (32, 255))
    assert slow == fast > 0


def test_one_measure_alone(perfect: Perfect, tmp_path: Path) -> None:
    perfect.spoil = ""
    found = toybox_svd.run(perfect, count=4, only=["fps"])
    assert found.keys() == {"model", "revision", "count", "count_other_tasks", "fps", "fps_in_order"}
    with pytest.raises(ValueError, match=r"one_thing: not measured of tiny-svd; there are kept, held_out, motion, fps"):
        toybox.run(str(tiny["write_tiny"](tmp_path / "tiny-svd")), "cpu", only=["fps", "one_thing"])


def test_a_folder_of_this_family_is_measured_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(toybox_svd, "run", lambda *args: seen.append(args) or {"count": args[1]})
    assert toybox.run(str(tiny["write_tiny"](tmp_path / "tiny-svd")), "cpu", count=3, seed=5) == {"count": 3}
    assert isinstance(seen[0][0], SvdPipeline)
    assert seen[0][1:4] == (3, 5, 8)


def test_both_pipelines_are_timed_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tiny["tiny_parts"]()
    parts = replace(parts, about=parts.about.model_copy(update={"fps": 12}))
    found = measure(parts, frames=3, size=(64, 64), steps=2, against=True)
    assert found["difference"] <= 1
    for name in ("diffusers", "reelflow"):
        row = found["rows"][name]
        assert min(row[phase] for phase in ("encoding", "sampling", "decoding")) > 0
        assert row["total"] >= row["sampling"] + row["decoding"]
        assert row["step"] == row["sampling"] / 2
    assert sum(found["flop_share"].values()) == pytest.approx(1)
    assert found["flops"]["sampling"] == 2 * found["flops"]["step"]
    assert found["faster"]["total"] == found["rows"]["diffusers"]["total"] / found["rows"]["reelflow"]["total"]
    words = table(found)
    assert "tiny-svd (unet 1." in words
    assert f"largest difference of a value: {found['difference']} of 255" in words
    assert "ours compiled" not in words
    compile_ = MagicMock()
    monkeypatch.setattr(SvdPipeline, "compile", compile_)
    alone = measure(tiny["tiny_parts"](), frames=2, steps=1, compiled=True)
    compile_.assert_called_once_with()
    assert "1 steps with guidance, ours compiled" in table(alone)
    assert set(alone["rows"]) == {"reelflow"}
    assert "faster" not in alone


def test_arithmetic_follows_size_and_length() -> None:
    parts = tiny["tiny_parts"]()
    one, long, wide = arithmetic(parts, 2, 64, 64), arithmetic(parts, 4, 64, 64), arithmetic(parts, 2, 64, 128)
    assert long["decoding"] == 2 * one["decoding"]
    assert long["encoding"] == one["encoding"]
    assert wide["encoding"] > 1.8 * one["encoding"]
    assert wide["step"] > 1.9 * one["step"]
