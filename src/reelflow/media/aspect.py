"""Which size a clip has at an aspect: the same area everywhere, sides in whole latent places."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, sqrt

ASPECTS = ("1:1", "2:3", "3:2", "16:9", "9:16", "4:5", "5:4", "21:9", "9:21")
"""Width : height."""
SMALLEST = 16
"""Pixels: a side shorter than this shows nothing a model could continue or learn from."""


def aspects(mixed: bool) -> tuple[str, ...]:
    """Those of a model: all of them, or square alone."""
    return ASPECTS if mixed else ("1:1",)


def frame_size(side: int, aspect: str, unit: int) -> tuple[int, int]:
    """(height, width) in pixels of area `side`²: side / √R and side · √R at aspect R = w / h, to the nearest multiple of `unit`.

    >>> frame_size(640, "16:9", 16)
    (480, 848)
    """
    across, down = map(int, aspect.split(":"))
    ratio = sqrt(across / down)
    return round(side / ratio / unit) * unit, round(side * ratio / unit) * unit


def nearest_aspect(height: float, width: float, among: Sequence[str] = ASPECTS) -> str:
    """The aspect nearest to a picture's, by the logarithm of the ratio.

    >>> nearest_aspect(1080, 1920)
    '16:9'
    """

    def distance(aspect: str) -> float:
        across, down = map(int, aspect.split(":"))
        return abs(log(across / down * height / width))

    return min(among, key=distance)
