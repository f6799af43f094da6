"""Pictures as Stable Video Diffusion sees them: cut to a size it takes, as pixels for the VAE and as a view for CLIP.

Shapes: H × W pixels; values −1 … 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reelflow.clip import Clip
from reelflow.media.aspect import SMALLEST, frame_size
from reelflow.pipelines.base import Picture, picture

UNIT, LARGEST = 64, 4096
"""Pixels: sides of a clip are multiples of the one, up to the other."""
VIEW = 224
"""Side of the picture that CLIP sees, whole and squashed."""


def factor(vae: Any) -> int:
    """Pixels per latent place, in each direction: 8 of the released models."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def own_size(unet: Any, factor: int = 8) -> tuple[int, int]:
    """(height, width) in pixels, the longer side last: of a pair as it is, of one number the 16:9 frame of that area.

    factor: pixels per latent place.
    """
    given = unet.config.sample_size
    if isinstance(given, Sequence):
        height, width = sorted(factor * side for side in given)
        return height, width
    height, width = frame_size(factor * given, "16:9", UNIT)
    return max(UNIT, height), max(UNIT, width)


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a (width, height). Raises ValueError naming the nearest that can be made."""
    if any(side < UNIT or side > LARGEST or side % UNIT for side in size):
        nearest = (min(LARGEST, max(UNIT, round(side / UNIT) * UNIT)) for side in size)
        raise ValueError(f"size {size[0]}x{size[1]}: sides are multiples of {UNIT} up to {LARGEST}; nearest: {'x'.join(map(str, nearest))}")
    return size[1], size[0]


def is_floating(image: Any) -> bool:
    return isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating)


def open_picture(image: Picture) -> Clip | np.ndarray:
    """A picture of any kind; arrays (H, W, 3) of floating-point values 0 … 1 stay as they are.

    Raises ValueError for what shows nothing or is no picture.
    """
    found = np.asarray(image) if is_floating(image) else picture(image)
    if isinstance(found, np.ndarray):
        if found.ndim != 3 or found.shape[2] != 3 or not np.isfinite(found).all() or found.min() < 0 or found.max() > 1:
            raise ValueError(f"the picture is {found.dtype} {found.shape}; give finite values 0 … 1, (H, W, 3)")
        height, width = found.shape[:2]
    else:
        height, width = found.height, found.width
    if min(height, width) < SMALLEST:
        raise ValueError(f"the picture is {width} × {height} pixels; give one of at least {SMALLEST} × {SMALLEST}")
    return found


def fitting_size(found: Clip | np.ndarray, own: tuple[int, int]) -> tuple[int, int]:
    """The model's own size, upright for upright pictures."""
    height, width = (found.height, found.width) if isinstance(found, Clip) else found.shape[:2]
    return own if width >= height else own[::-1]


def pixels(found: Clip | np.ndarray, height: int, width: int) -> Tensor:
    """(3, H, W) of the largest centred part of that shape, scaled, never squashed."""
    if isinstance(found, Clip):
        values = torch.from_numpy(np.array(found.resized(height, width).frames[0])).float() / 255
        return values.permute(2, 0, 1) * 2 - 1
    values = torch.from_numpy(np.array(found, np.float32)).permute(2, 0, 1)
    scale = max(height / values.shape[1], width / values.shape[2])
    if scale != 1:
        covering = [max(least, round(side * scale)) for side, least in zip(values.shape[1:], (height, width), strict=True)]
        values = F.interpolate(values[None], covering, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
    top, left = (values.shape[1] - height) // 2, (values.shape[2] - width) // 2
    return values[:, top : top + height, left : left + width] * 2 - 1


def clip_view(pixels_B3HW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """What CLIP is shown: (B, 3, 224, 224), blurred against aliasing, resized without cropping, standardised.

    A Gaussian of (factor − 1) / 2 pixels, then bicubic with the corners in place, as the model was trained.
    """
    x = pixels_B3HW.float()
    for axis in (3, 2):
        x = _blurred(x, axis, x.shape[axis] / VIEW)
    x = F.interpolate(x, (VIEW, VIEW), mode="bicubic", align_corners=True)
    mean_311, std_311 = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (mean, std))
    return ((x + 1) / 2 - mean_311) / std_311


def _blurred(x_B3HW: Tensor, axis: int, factor: float) -> Tensor:
    width = max((factor - 1) / 2, 0.001)
    taps = int(max(4 * width, 3)) // 2 * 2 + 1
    reach = taps // 2
    kernel = torch.exp(-(torch.arange(-reach, reach + 1, device=x_B3HW.device, dtype=x_B3HW.dtype) ** 2) / (2 * width**2))
    kernel = (kernel / kernel.sum()).view((1, 1, 1, -1) if axis == 3 else (1, 1, -1, 1)).repeat(3, 1, 1, 1)
    padding = (reach, reach, 0, 0) if axis == 3 else (0, 0, reach, reach)
    return F.conv2d(F.pad(x_B3HW, padding, mode="reflect"), kernel, groups=3)


__all__ = ["check_size", "clip_view", "factor", "fitting_size", "open_picture", "own_size", "pixels"]
