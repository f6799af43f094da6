"""The measure of a model that knows toybox: perfect clips get full marks, clips of something else do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from reelflow.clip import Clip
from reelflow.data.toybox import canonical, scene_from_prompt
from reelflow.evaluation.toybox import codec, generate, scenes, shown
from reelflow.pipelines.starflow import Sampling


def marks(make: Any) -> dict[str, float]:
    """Of a model whose answer to a prompt is `make(scene)`."""

    def generate_batch(prompts: list[str], seeds: list[int], sampling: Sampling) -> list[Clip]:
        assert len(prompts) == len(seeds)
        return [make(scene_from_prompt(prompt, seed)) for prompt, seed in zip(prompts, seeds, strict=True)]

    pipe: Any = SimpleNamespace(generate_batch=generate_batch)
    return generate(pipe, scenes(12, "train", 1), 0, 5, Sampling(), lambda share: None)


def test_a_perfect_model_gets_full_marks() -> None:
    assert set(marks(shown).values()) == {1.0}


def test_what_a_codec_loses_is_its_own_row() -> None:
    def through(decode: Any) -> dict[str, float]:
        pipe: Any = SimpleNamespace(codec=SimpleNamespace(encode=lambda frames: frames, decode=decode))
        return codec(pipe, 4, Sampling())

    def coarse(frames: Any) -> Any:
        return frames[:, :, ::16, ::16].repeat_interleave(16, 2).repeat_interleave(16, 3)

    kept, blurred = through(lambda frames: frames), through(coarse)
    assert set(kept.values()) == {1.0, kept["psnr"]}
    assert blurred["shape"] < 1
    assert blurred["psnr"] < 25 < kept["psnr"]


def test_mirrored_clips_go_the_wrong_way() -> None:
    found = marks(lambda scene: Clip(np.ascontiguousarray(shown(scene).frames[:, :, ::-1]), 16))
    assert found["colour"] == found["shape"] == found["background"] == 1
    assert found["direction"] < 1
    assert found["motion"] < 1


def test_other_colours_are_seen() -> None:
    found = marks(lambda scene: Clip(np.ascontiguousarray(shown(scene).frames[..., ::-1]), 16))
    assert found["colour"] < 0.8, "green, purple and white are much the same with red and blue exchanged"
    assert found["motion"] > 0.8


def test_scenes_are_what_a_prompt_can_say() -> None:
    for scene in scenes(20, "held_out", 1):
        assert scene.held_out
        again = scene_from_prompt(canonical(scene), 0)
        assert canonical(again) == canonical(scene)
