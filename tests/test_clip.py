"""The clip as a value: what it accepts, its time and size arithmetic, and the pictures made of it."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reelflow.clip import HEAT, Clip, contact_sheet, heat_map, side_by_side

RATES = st.sampled_from(
    [Fraction(n) for n in (1, 3, 7, 8, 10, 16, 24, 25, 30, 50, 60)] + [Fraction(179, 6), Fraction(30000, 1001), Fraction(25, 2)]
)


def numbered(count: int, fps: float = 16, height: int = 4, width: int = 6) -> Clip:
    """Frame k is filled with k."""
    return Clip(np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, 3)).copy(), fps, {"seed": 1})


def numbers(clip: Clip) -> list[int]:
    return clip.frames[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((3, 4, 4, 3)), 16, "float64"),
        (np.zeros((4, 4, 3), np.uint8), 16, r"\(4, 4, 3\)"),
        (np.zeros((3, 3, 4, 4), np.uint8), 16, r"\(3, 3, 4, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), 16, "empty"),
        (np.zeros((1, 0, 4, 3), np.uint8), 16, "empty"),
        ([[1]], 16, "list"),
        (np.zeros((3, 4, 4, 3), np.uint8), 0, "fps is 0"),
        (np.zeros((3, 4, 4, 3), np.uint8), -1.0, "fps is -1"),
        (np.zeros((3, 4, 4, 3), np.uint8), math.nan, "fps is nan"),
        (np.zeros((3, 4, 4, 3), np.uint8), "16", "fps is '16'"),
        (np.zeros((3, 4, 4, 3), np.uint8), 10_000, "fps is 10000"),
    ],
)
def test_what_is_no_clip_is_refused(frames, fps, message):
    with pytest.raises(ValueError, match=message):
        Clip(frames, fps)


def test_metadata_is_a_dictionary():
    with pytest.raises(ValueError, match="metadata is 'x'"):
        Clip(np.zeros((1, 1, 1, 3), np.uint8), 16, "x")


def test_measures():
    clip = Clip(np.zeros((33, 12, 20, 3), np.uint8), 16)
    assert (len(clip), clip.height, clip.width, clip.seconds, clip.metadata) == (33, 12, 20, 2.0625, {})


# ------------------------------------------------------------------------------------------------------------------------- time


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 30), old=RATES, new=RATES)
def test_resampling_takes_the_nearest_frame_in_time(count, old, new):
    """Against the definition, by brute force in exact fractions."""
    resampled = numbered(count, float(old)).resample(float(new))
    times = [k / new for k in range(70 * count) if k / new < count / old]
    assert len(resampled) == len(times)
    for number, time in zip(numbers(resampled), times, strict=True):
        distance = abs(number / old - time)
        assert distance == min(abs(Fraction(k) / old - time) for k in range(count))
    assert numbers(resampled) == sorted(numbers(resampled))
    assert resampled.fps == float(new)
    assert abs(resampled.seconds - count / old) <= 1 / new
    assert resampled.metadata == {"seed": 1}


@given(count=st.integers(1, 90), rate=RATES, factor=st.integers(1, 5))
def test_resampling_to_a_multiple_and_back_changes_nothing(count, rate, factor):
    clip = numbered(count, float(rate))
    assert numbers(clip.resample(float(rate))) == numbers(clip)
    if rate * factor <= 1000:
        assert numbers(clip.resample(float(rate * factor)).resample(float(rate))) == numbers(clip)


def test_resampling_by_hand():
    assert numbers(numbered(9, 16).resample(8)) == [0, 2, 4, 6, 8]
    assert numbers(numbered(3, 8).resample(16)) == [0, 1, 1, 2, 2, 2]
    assert numbers(numbered(4, 30).resample(20)) == [0, 2, 3]
    for wrong in (0, -3, math.inf, "x", None):
        with pytest.raises(ValueError, match="fps is"):
            numbered(3).resample(wrong)


def test_slices():
    clip = numbered(9)
    assert numbers(clip[2:5]) == [2, 3, 4]
    assert numbers(clip[-2:]) == [7, 8]
    assert clip[2:5].metadata == clip.metadata
    assert clip[2:5].fps == 16
    with pytest.raises(ValueError, match=r"clip\[9:12\] is empty: the clip has 9 frames"):
        clip[9:12]
    for wrong in (3, slice(0, 9, 2), slice(None, None, -1)):
        with pytest.raises(TypeError, match=r"use clip\[a:b\]"):
            clip[wrong]


def test_joining():
    clip = numbered(9)
    assert numbers(clip[:4] + clip[4:]) == list(range(9))
    with pytest.raises(ValueError, match="6 x 4 and 6 x 5 pixels"):
        clip + numbered(3, height=5)
    with pytest.raises(ValueError, match="16 and 24 frames per second"):
        clip + numbered(3, fps=24)


# ------------------------------------------------------------------------------------------------------------------------- size


@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 40), w=st.integers(1, 40), height=st.integers(1, 40), width=st.integers(1, 40))
def test_any_size_becomes_any_size(h, w, height, width):
    clip = Clip(np.full((2, h, w, 3), (9, 99, 199), np.uint8), 16, {"seed": 1})
    resized = clip.resized(height, width)
    assert resized.frames.shape == (2, height, width, 3)
    assert np.array_equal(resized.frames, np.broadcast_to(np.uint8([9, 99, 199]), resized.frames.shape))
    assert (resized.fps, resized.metadata) == (16, {"seed": 1})


@pytest.mark.parametrize(("height", "width"), [(60, 60), (60, 120), (30, 90), (90, 30), (240, 160)])
def test_resizing_crops_the_centre_and_never_squashes(height, width):
    """A disc stays a disc, in the middle, and what does not fit is cut off equally."""
    y, x = np.mgrid[:120, :180]
    disc = np.where(((x - 89.5) ** 2 + (y - 59.5) ** 2 < 20**2)[..., None], 255, 0).astype(np.uint8) + np.zeros(3, np.uint8)
    resized = Clip(disc[None], 16).resized(height, width).frames[0, :, :, 0] > 127
    scale = max(height / 120, width / 180)
    assert np.ptp(np.flatnonzero(resized.any(axis=1))) + 1 == pytest.approx(40 * scale, abs=1.5)
    assert np.ptp(np.flatnonzero(resized.any(axis=0))) + 1 == pytest.approx(40 * scale, abs=1.5)
    assert np.array_equal(resized, resized[::-1])
    assert np.array_equal(resized, resized[:, ::-1])


def test_resizing_smooths_what_it_cannot_show():
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert np.abs(Clip(stripes, 16).resized(16, 16).frames[:, 2:-2, 2:-2].astype(int) - 127).max() <= 4


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (2.5, 4), ("4", 4)])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match="is not possible"):
        numbered(2).resized(*size)


# --------------------------------------------------------------------------------------------------------------------- pictures


def test_the_contact_sheet_shows_first_to_last():
    clip = Clip(np.broadcast_to(np.arange(33, dtype=np.uint8)[:, None, None, None] * 7, (33, 10, 20, 3)).copy(), 16)
    sheet = np.asarray(contact_sheet(clip, columns=4, rows=2))
    assert sheet.shape == (2 * 12 - 2, 4 * 22 - 2, 3)
    shown = [sheet[row * 12, column * 22, 0] // 7 for row in range(2) for column in range(4)]
    assert shown[0] == 0
    assert shown[-1] == 32
    assert np.diff(shown) == pytest.approx(32 / 7, abs=1)
    assert contact_sheet(clip[:3]).size == (3 * 22 - 2, 10)
    assert contact_sheet(clip, columns=1).size == (20, 10)
    assert contact_sheet(clip.resized(300, 600), columns=2).size == (2 * 258 - 2, 128)
    with pytest.raises(ValueError, match="0 columns"):
        contact_sheet(clip, columns=0)


def test_side_by_side():
    left, right = numbered(5, width=6), numbered(5, width=8)
    both = side_by_side(left, right)
    assert both.frames.shape == (5, 4, 14, 3)
    assert np.array_equal(both.frames[:, :, :6], left.frames)
    assert np.array_equal(both.frames[:, :, 6:], right.frames)
    for other, message in (
        (numbered(4), "5 and 4 frames long"),
        (numbered(5, height=3), "pixels high"),
        (numbered(5, fps=8), "per second"),
    ):
        with pytest.raises(ValueError, match=message):
            side_by_side(left, other)


def test_the_heat_map_is_bright_where_values_are_high():
    clip = Clip(np.full((4, 32, 48, 3), 100, np.uint8), 16, {"seed": 1})
    values = np.zeros((4, 4, 6))
    values[2, 1, 4] = 5.0
    result = heat_map(values, clip)
    assert result.frames.shape == (4, 32, 96, 3)
    assert np.array_equal(result.frames[:, :, :48], clip.frames)
    heat = result.frames[:, :, 48:].astype(float).sum(axis=-1)
    frame, row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert (frame, row // 8, column // 8) == (2, 1, 4)
    assert np.ptp(heat[0]) == 0
    fixed = heat_map(values, clip, low=0.0, high=50.0).frames[:, :, 48:].astype(float).sum(axis=-1)
    assert fixed.max() < heat.max()


def test_the_colours_of_the_heat_map_rise_evenly_in_lightness():
    """CIE L* of the anchors, by the definition of sRGB."""
    linear = np.where(HEAT / 255 <= 0.04045, HEAT / 255 / 12.92, ((HEAT / 255 + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    lightness = np.where(luminance > 216 / 24389, 116 * np.cbrt(luminance) - 16, luminance * 24389 / 27)
    assert np.diff(lightness) == pytest.approx(np.full(len(HEAT) - 1, 12.2), abs=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [(np.zeros((3, 4, 4)), r"\(5, h, w\)"), (np.zeros((5, 4)), "one map per frame"), (np.full((5, 2, 2), np.nan), "20 places")],
)
def test_heat_maps_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        heat_map(values, numbered(5))


def test_a_flat_heat_map_is_dark():
    result = heat_map(np.full((2, 3, 3), 7.0), numbered(2, height=9, width=9))
    assert result.frames[:, :, 9:].max() < 20
    assert isinstance(contact_sheet(result), Image.Image)
