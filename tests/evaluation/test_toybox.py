"""The measure of a model that knows toybox: perfect clips get full marks, clips of something else do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from reelflow.clip import Clip
from reelflow.data.scene import Scene
from reelflow.data.toybox import canonical, edit_pair, scene_from_prompt
from reelflow.evaluation.toybox import SEED, codec, edit, extend, generate, run, scenes, shown
from reelflow.pipelines.starflow import Sampling


def marks(make: Any, things: int = 1) -> dict[str, float]:
    """Of a model whose answer to a prompt is `make(scene)`."""

    def generate_batch(prompts: list[str], seeds: list[int], sampling: Sampling) -> list[Clip]:
        assert len(prompts) == len(seeds)
        return [make(scene_from_prompt(prompt, seed)) for prompt, seed in zip(prompts, seeds, strict=True)]

    pipe: Any = SimpleNamespace(generate_batch=generate_batch)
    return generate(pipe, scenes(12, "train", things), 0, 5, Sampling(), lambda share: None)


def test_a_perfect_model_gets_full_marks() -> None:
    assert set(marks(shown).values()) == {1.0}


def test_of_pairs_each_kind_of_motion_counts_where_one_thing_has_it() -> None:
    def stopping(scene: Scene) -> Clip:
        circles = any(thing.motion == "circles" for thing in scene.things)
        return Clip(shown(scene).frames[[0] * 33], 16) if circles else shown(scene)

    asked = [{thing.motion for thing in scene.things} for scene in scenes(12, "train", 2)]
    found = marks(stopping, things=2)
    assert found["with circles"] == 0
    assert found["motion"] == round(sum("circles" not in motions for motions in asked) / 12, 4)
    assert found["direction"] == 1 > found["with direction"] > 0


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


def test_an_edit_changes_what_was_asked_and_nothing_moves_otherwise() -> None:
    pairs = [edit_pair(SEED, index) for index in range(50 * 8)]

    def through(answer: Any, frames: int = 33) -> dict[str, float]:
        def edited(clip: Clip, words: str, **settings: Any) -> Clip:
            assert len(clip) == frames
            asked = (pair for pair in pairs if pair[2] == words)
            before, after, _ = next(pair for pair in asked if np.array_equal(shown(pair[0], frames).frames, clip.frames))
            return shown(answer(before, after), frames)

        return edit(cast("Any", SimpleNamespace(edit=edited)), 8, Sampling(), frames)

    assert set(through(lambda before, after: after).values()) == {1.0}
    short = through(lambda before, after: after, 17)
    assert short["colour"] == short["motion"] == 1.0
    unchanged = through(lambda before, after: before)
    assert unchanged["motion"] == 1.0
    assert unchanged["all"] == 0.0
    elsewhere = through(lambda before, after: after.with_thing(0, x=128 - after.things[0].x, y=128 - after.things[0].y))
    assert elsewhere["colour"] == elsewhere["shape"] == 1.0
    assert elsewhere["motion"] == elsewhere["all"] < 0.5


def test_an_extension_is_judged_by_its_end() -> None:
    def extended(clip: Clip, prompt: str, seconds: float, seed: int, sampling: Sampling) -> Clip:
        asked = next(scene for scene in scenes(4, "train", 1) if np.array_equal(shown(scene).frames, clip.frames))
        whole = shown(asked, round(seconds * 16)).frames.copy()
        whole[lasts:] = whole[0, 0, 0]
        return Clip(whole, 16)

    pipe: Any = SimpleNamespace(extend=extended)
    lasts = 161
    assert set(extend(pipe, 4, Sampling(), frames=161).values()) == {1.0}
    lasts = 140
    found = extend(pipe, 4, Sampling(), frames=161)
    assert (found["there"], found["all"]) == (0.0, 0.0), "seen in some of the last 33 frames, gone at the end"
    assert found["background"] == 1.0


def test_an_extension_in_which_all_stands_still_does_not_go_on() -> None:
    def frozen(clip: Clip, prompt: str, seconds: float, seed: int, sampling: Sampling) -> Clip:
        return Clip(np.concatenate((clip.frames, np.repeat(clip.frames[-1:], round(seconds * 16) - len(clip), 0))), 16)

    found = extend(cast("Any", SimpleNamespace(extend=frozen)), 16, Sampling(), frames=97)
    still = [scene.things[0].motion == "stays still" for scene in scenes(16, "train", 1)]
    assert found["goes on"] == round(sum(still) / 16, 4), "what was asked to stay still may"


def test_one_measure_alone() -> None:
    found = run("mini", "cpu", count=4, only=["codec"])
    assert found.keys() == {"model", "revision", "count", "count_other_tasks", "codec"}
    with pytest.raises(ValueError, match="speed: not measured of mini; there are one_thing, "):
        run(only=["speed"])
    with pytest.raises(ValueError, match="extended 33 is not usable; give more than the 33 frames"):
        run(extended=33)
    with pytest.raises(ValueError, match="edited 34 is not usable; give 5 to 33 frames"):
        run(edited=34)


def test_scenes_are_what_a_prompt_can_say() -> None:
    for scene in scenes(20, "held_out", 1):
        assert scene.held_out
        again = scene_from_prompt(canonical(scene), 0)
        assert canonical(again) == canonical(scene)
