"""Out of memory: what would have fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from reelflow.pipelines.svd.picture import UNIT

if TYPE_CHECKING:
    from reelflow.pipelines.svd.pipeline import SvdPipeline


def activation_bytes(pipe: SvdPipeline, clips: int, frames: int, height: int, width: int) -> int:
    """What sampling one clip of this size holds besides the weights, at most, roughly.

    UNet: at its first resolution the skips of a level and what a block works on, about 24 tensors of its width for both
    guidance rows. Decoder: two tensors of a whole clip at full resolution in its last width, and a frame at twice that.
    """
    places, unet, decoder = frames * height * width, pipe.denoiser.conv_latent, pipe.decoder.conv_out.weight
    sampling = 24 * 2 * clips * places // pipe.factor**2 * unet.shape[0] * unet.element_size()
    decoding = (2 + 2 / frames) * places * decoder.shape[1] * decoder.element_size() + 2 * clips * places * 3 * 4
    return int(max(sampling, decoding))


def free_bytes(device: torch.device) -> int | None:
    """What is left on a device, or of the machine; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def what_fits(pipe: SvdPipeline, frames: int, height: int, width: int, free: int | None) -> str:
    """A request that needs no more than `free` bytes, in words: fewer frames, else a smaller size."""
    free = activation_bytes(pipe, 1, frames, height, width) // 2 if free is None else free
    for count in range(frames - 1, 0, -1):
        if count * 2 >= frames and activation_bytes(pipe, 1, count, height, width) <= free:
            return f"--frames {count} would fit"
    for wide in range(width - UNIT, 0, -UNIT):
        high = max(UNIT, round(wide * height / width / UNIT) * UNIT)
        if activation_bytes(pipe, 1, frames, high, wide) <= free:
            return f"--size {wide}x{high} would fit"
    return "nothing of this length fits; use a machine with more memory, or --device cpu"


@contextmanager
def fitting(pipe: SvdPipeline, clips: int, frames: int, height: int, width: int) -> Iterator[None]:
    """Make running out of memory a ValueError that says what would fit."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "alloc" not in str(error):
            raise
        several = f"{clips} clips of " if clips > 1 else ""
        less = "fewer clips at once" if clips > 1 else what_fits(pipe, frames, height, width, free_bytes(pipe.device))
    else:
        return
    raise ValueError(f"out of memory with {several}{frames} frames of {width} × {height}; {less}")


__all__ = ["activation_bytes", "fitting", "what_fits"]
