"""A sample becomes frames at the model's rate and size, from a place that seed, epoch and name decide; what fails says why."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from reelflow.clip import Clip
from reelflow.data.ahead import ahead
from reelflow.data.decode import ENDLESS, Measure, View
from reelflow.data.failures import Failures, UnusableError
from reelflow.data.source import Blob, Member, Sample
from reelflow.data.toybox import render, sample_scene
from reelflow.media.aspect import ASPECTS, frame_size

VIEW = View(fps=8, side=64, unit=16, step=4, aspects=ASPECTS, random_crop=False, seed=0)


def sample(path: Path | Blob | Member | None, key: str = "a", **more: object) -> Sample:
    return Sample(key, path, ("words",), **more)  # type: ignore[arg-type]


def test_measures(media: Path) -> None:
    assert VIEW.measure(sample(media / "wide.mp4")) == Measure(16, "16:9", still=False)
    assert VIEW.measure(sample(media / "tall.mp4")) == Measure(12, "9:16", still=False)
    assert VIEW.measure(sample(media / "still.png")) == Measure(1, "3:2", still=True)
    assert VIEW.measure(sample(media / "wide.mp4", source=media / "tall.mp4")) == Measure(12, "16:9", still=False)
    assert VIEW.measure(Sample("toy", sample_scene(0, 0), ("words",))) == Measure(ENDLESS, "1:1", still=False)


def test_a_whole_clip_is_resampled_cropped_and_resized(media: Path) -> None:
    clip = sample(media / "wide.mp4")
    piece = VIEW.take(clip, VIEW.measure(clip), frames=99, least=5, epoch=0)
    wanted = Clip.open(media / "wide.mp4").resample(8).resized(*frame_size(64, "16:9", 16))
    assert piece.frames.shape == (1, 13, 48, 80, 3), "1 + 4k of 16 frames"
    places = [start for start in range(4) if np.array_equal(piece.frames[0], wanted.frames[start : start + 13])]
    assert len(places) == 1
    assert piece.aspect == "16:9"


def test_the_place_follows_from_seed_epoch_and_name(media: Path) -> None:
    clip = sample(media / "wide.mp4")
    measure = VIEW.measure(clip)

    def first(view: View, key: str, epoch: int) -> bytes:
        return view.take(sample(media / "wide.mp4", key), measure, 5, 5, epoch).frames[0, 0].tobytes()

    assert first(VIEW, "a", 3) == first(VIEW, "a", 3)
    assert len({first(VIEW, "a", epoch) for epoch in range(8)}) > 3
    assert len({first(VIEW, key, 0) for key in "abcdefgh"}) > 3
    other = View(**(vars(VIEW) | {"seed": 1}))
    assert [first(VIEW, "a", epoch) for epoch in range(8)] != [first(other, "a", epoch) for epoch in range(8)]


def test_random_crops_move_over_the_picture(media: Path) -> None:
    moving = View(**(vars(VIEW) | {"random_crop": True, "aspects": ("1:1",)}))
    clip = sample(media / "still.png")
    measure = moving.measure(clip)
    found = {moving.take(clip, measure, 9, 9, epoch).frames.tobytes() for epoch in range(5)}
    assert len(found) == 5
    centred = View(**(vars(VIEW) | {"aspects": ("1:1",)}))
    np.testing.assert_array_equal(centred.take(clip, measure, 9, 9, 0).frames[0], Clip.open(media / "still.png").resized(64, 64).frames)


def test_files_inside_others_are_the_same_clip(media: Path, tmp_path: Path) -> None:
    data = (media / "tall.mp4").read_bytes()
    (tmp_path / "a.tar").write_bytes(b"before" + data + b"after")
    found = []
    for where in (media / "tall.mp4", Blob(data, "mp4"), Member(tmp_path / "a.tar", 6, len(data), "mp4")):
        clip = sample(where)
        found.append(VIEW.take(clip, VIEW.measure(clip), 9, 9, 0).frames)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_both_clips_of_an_edit_come_from_the_same_place(media: Path) -> None:
    clip = sample(media / "wide.mp4", source=media / "wide.mp4")
    piece = VIEW.take(clip, VIEW.measure(clip), 5, 5, 2)
    assert piece.frames.shape == (2, 5, 48, 80, 3)
    np.testing.assert_array_equal(piece.frames[0], piece.frames[1])


def test_scenes_are_rendered_from_their_beginning() -> None:
    scene = sample_scene(0, 3)
    clip = Sample("toy", scene, ("words",))
    piece = VIEW.take(clip, VIEW.measure(clip), 5, 5, 7)
    np.testing.assert_array_equal(piece.frames[0], render([scene], 5, 64)[0].numpy())


def reasons(clip: Sample, least: int = 5) -> tuple[str, str]:
    with pytest.raises(UnusableError) as error:
        VIEW.take(clip, VIEW.measure(clip), 9, least, 0)
    return error.value.reason, str(error.value)


def test_what_cannot_be_used_says_why(media: Path, tmp_path: Path) -> None:
    Clip(np.zeros((9, 8, 64, 3), np.uint8), 8).save(tmp_path / "flat.gif")
    (tmp_path / "noise.mp4").write_bytes(b"noise")
    whole = (media / "wide.mp4").read_bytes()
    assert reasons(Sample("x/a.mp4", media / "wide.mp4", ())) == ("without a caption", "x/a.mp4 has no caption")
    assert reasons(sample(media / "short.mp4", "s")) == (
        "too short", "s: 3 frames at 8 per second; at least 5 are asked for (data.min_frames)",
    )  # fmt: skip
    assert reasons(sample(tmp_path / "flat.gif", "f")) == ("too small", "f: 64 × 8 pixels; at least 16 × 16 are needed")
    assert reasons(sample(None, "n")) == ("that cannot be decoded", "n: no video or picture in it")
    for broken in (tmp_path / "noise.mp4", Blob(b"noise", "mp4"), Blob(whole[: len(whole) // 2], "mp4"), tmp_path / "gone.mp4"):
        reason, words = reasons(sample(broken, "the key"))
        assert reason == "that cannot be decoded"
        assert words.startswith(f"{broken} " if isinstance(broken, Path) else "the key ")
        assert "reelflow-" not in words, "the name of a temporary file"
        assert "\n" not in words


def test_a_video_that_stops_before_its_header_says(media: Path) -> None:
    clip = sample(media / "tall.mp4", "t")
    with pytest.raises(UnusableError, match=r"t: stops after \d+ of 21 frames"):
        VIEW.take(clip, Measure(21, "1:1", still=False), 21, 5, 0)


# -------------------------------------------------------------------------------------------------------------------- failures


def test_failures_are_counted_named_and_written_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "failures.jsonl"
    for _ in range(2):
        failures = Failures(path, 1.0)
        failures.seen(5)
        for key in ("a", "b", "c", "d", "a"):
            failures.add(key, "too short", f"{key}: of one frame")
        failures.add("e", "without a caption", "e has no caption")
        assert str(failures) == "5 (4 too short: a, b, c, …; 1 without a caption: e)"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["key"] for row in rows] == ["a", "b", "c", "d", "e"]
    assert rows[0] == {"key": "a", "reason": "too short", "message": "a: of one frame"}


def test_a_line_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "failures.jsonl"
    path.write_text('{"key": "a", "reason": "r", "message": "m"}\n{"key": "b", "rea')
    failures = Failures(path, 1.0)
    failures.seen(3)
    for key in "abc":
        failures.add(key, "r", "m")
    lines = path.read_text().splitlines()
    assert [json.loads(line)["key"] for line in (lines[0], *lines[2:])] == ["a", "b", "c"]


def test_too_many_failures_stop_after_fifty_clips_or_at_the_end(tmp_path: Path) -> None:
    failures = Failures(tmp_path / "failures.jsonl", 0.1)
    for index in range(40):
        failures.seen()
        failures.add(str(index), "too short", "m")
    with pytest.raises(ValueError, match=r"40 \(40 too short: 0, 1, 2, …\) of 40 clips cannot be used, more than max_failed_share = 0\.1"):
        failures.judge()
    failures.seen(360)
    failures.judge()
    failures.seen()
    with pytest.raises(ValueError, match="41 .* of 401 clips"):
        failures.add("one more", "too short", "m")


# ----------------------------------------------------------------------------------------------------------------------- ahead


def test_ahead_keeps_the_order_and_its_distance() -> None:
    asked: list[int] = []

    def items():
        for index in range(20):
            asked.append(index)
            yield index

    found = ahead(lambda index: index * 2, items(), workers=3, depth=4)
    assert next(found) == 0
    assert asked == list(range(5))
    assert [next(found), next(found)] == [2, 4]
    assert asked == list(range(7))
    assert list(found) == [index * 2 for index in range(3, 20)]


def test_ahead_works_in_threads_and_passes_errors_on() -> None:
    meeting = threading.Barrier(2, timeout=30)

    def work(index: int) -> int:
        meeting.wait()  # two at a time, or none
        if index == 3:
            raise ValueError("three")
        return index

    found = ahead(work, range(4), workers=2, depth=2)
    assert [next(found), next(found), next(found)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(found)
