"""A clip brought to another rate and size while it is decoded is the clip brought there afterwards; probing agrees with reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reelflow.clip import Clip, MediaError
from reelflow.media.read import Facts, probe, read
from reelflow.media.timeline import Limits, Shown, Sieve


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames of 96 x 64 pixels, 12 per second, no two alike."""
    frames = np.random.default_rng(0).integers(0, 255, (24, 8, 12, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    path = tmp_path_factory.mktemp("sieve") / "noise.mp4"
    Clip(frames, 12).save(path)
    return path


@pytest.mark.parametrize("fps", [5.0, 8.0, 12.0, 30.0])
def test_the_sieve_is_resample_and_resized(video: Path, fps: float) -> None:
    wanted = Clip.open(video).resample(fps).resized(32, 40)
    frames, rate, _ = read(video, sieve=Sieve(fps, 32, 40))
    assert rate == fps
    np.testing.assert_array_equal(frames, wanted.frames)
    np.testing.assert_array_equal(read(video, max_frames=3, sieve=Sieve(fps, 32, 40))[0], wanted.frames[:3])


def test_the_sieve_begins_where_it_is_told(video: Path) -> None:
    wanted = Clip.open(video).resample(6).resized(32, 32).frames[4:7]
    np.testing.assert_array_equal(read(video, 3, start=4 / 6, sieve=Sieve(6, 32, 32))[0], wanted)


def test_the_sieve_takes_another_part_of_the_picture(video: Path) -> None:
    whole = Clip.open(video)
    left = read(video, sieve=Sieve(12, 64, 64, (0.0, 0.0)))[0]
    right = read(video, sieve=Sieve(12, 64, 64, (1.0, 1.0)))[0]
    np.testing.assert_array_equal(left, whole.frames[:, :, :64])
    np.testing.assert_array_equal(right, whole.frames[:, :, -64:])


def test_pictures_and_animations_pass_the_sieve_too(video: Path, tmp_path: Path) -> None:
    clip = Clip.open(video)
    clip[:6].resample(10).save(tmp_path / "a.gif")
    wanted = Clip.open(tmp_path / "a.gif").resample(5).resized(16, 16)
    np.testing.assert_array_equal(read(tmp_path / "a.gif", sieve=Sieve(5, 16, 16))[0], wanted.frames)
    clip[:1].save(tmp_path / "a.png")
    assert read(tmp_path / "a.png", max_frames=9, sieve=Sieve(5, 16, 16))[0].shape == (1, 16, 16, 3)


def test_memory_is_limited_by_the_result(video: Path) -> None:
    small = Limits(memory=24 * 16 * 16 * 3)
    assert len(read(video, limits=small, sieve=Sieve(12, 16, 16))[0]) == 24
    with pytest.raises(MediaError, match="over the limit"):
        read(video, limits=small, sieve=Sieve(12, 32, 32))


def test_a_clip_that_changes_its_size_is_refused() -> None:
    sizes = [(8, 8), (8, 8), (8, 12)]
    shown = (Shown(k / 8, 1 / 8, lambda size=size: np.zeros((*size, 3), np.uint8)) for k, size in enumerate(sizes))
    with pytest.raises(MediaError, match=r"a\.mp4 changes its size to 12 x 8 at 0\.25 s"):
        [frame.picture() for frame in Sieve(8, 4, 4)(Path("a.mp4"), shown, 0.0)]


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif"])
def test_probing_agrees_with_reading(video: Path, tmp_path: Path, name: str) -> None:
    Clip.open(video).save(tmp_path / name)
    facts, clip = probe(tmp_path / name), Clip.open(tmp_path / name)
    assert (facts.height, facts.width) == (clip.height, clip.width)
    assert facts.seconds == pytest.approx(clip.seconds, abs=0.02)


def test_a_still_has_no_seconds(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 30))
    turned = picture.getexif()
    turned[274] = 6  # shown turned by a quarter
    picture.save(tmp_path / "a.jpg", exif=turned)
    assert probe(tmp_path / "a.jpg") == Facts(20, 30, 0.0)


def test_what_cannot_be_read_cannot_be_probed(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(MediaError, match="neither a picture nor a video"):
        probe(tmp_path / "a.mp4")
