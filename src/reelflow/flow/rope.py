"""Rotary positions over text, latent frame, row and column.

Shapes: B batch, H heads, T tokens, D channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reelflow.flow.affine import wide

THETA = 10_000.0
TIME_FREQUENCIES = 8


class Rotary(NamedTuple):
    """Every token's rotations as unit complex numbers (T, D / 2) or (B, 1, T, D / 2), and which channels form a pair."""

    turn: Tensor
    halves: bool

    def rotate(self, x_BHTD: Tensor) -> Tensor:
        """Rotate every pair of channels by its angle, in float32; pairs are (2i, 2i + 1), or (i, i + D / 2) with `halves`."""
        x = wide(x_BHTD)
        pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2) if self.halves else x.unflatten(-1, (-1, 2))
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * self.turn)
        return (turned.transpose(-1, -2) if self.halves else turned).flatten(-2).to(x_BHTD.dtype)


def positions(place: Tensor, height: int, width: int, span: float, text_tokens: int = 0) -> Tensor:
    """(row, column, third axis) of every `place` (…), float32 (…, 3).

    Places count the tokens of the video from 0, frame after frame in raster order; the L text tokens in front of it stand
    at −L … −1. Rows and columns are scaled so that a frame of any aspect spans about `span`; text token i sits at
    row = column = 0 and `i · span / L` on the third axis, which for the video is the latent frame's index.
    """
    unit = span / (height * width) ** 0.5
    frame, inside = place.div(height * width, rounding_mode="floor"), place % (height * width)
    row, column = inside.div(width, rounding_mode="floor") * unit, inside % width * unit
    text = (place + text_tokens) * (span / max(text_tokens, 1))
    video = place >= 0
    return torch.stack((row * video, column * video, torch.where(video, frame.to(text.dtype), text)), -1)


def rotary(positions_T3: Tensor, head_dim: int, third_axis: bool, halves: bool = False) -> Rotary:
    """Angles `position · frequency`; `third_axis`: 8 frequencies of each head are kept for time and text."""
    spatial = head_dim // 2 - (TIME_FREQUENCIES if third_axis else 0)
    device = positions_T3.device
    frequency = THETA ** (-torch.arange(0, spatial, 2, dtype=torch.float32, device=device) / spatial)
    angles = [positions_T3[..., 0, None] * frequency, positions_T3[..., 1, None] * frequency]
    if third_axis:
        time = THETA ** (-torch.arange(TIME_FREQUENCIES, dtype=torch.float32, device=device) / TIME_FREQUENCIES)
        angles.append(positions_T3[..., 2, None] * time)
    angle = torch.cat(angles, -1)
    return Rotary(torch.polar(torch.ones_like(angle), angle), halves)
