"""The blocks of Stable Video Diffusion, rearranged: diffusers' numbers up to rounding, from less work and memory.

Built from loaded diffusers modules; what a block does not change it shares with them. Against diffusers' own forward:

- Cross-attention has one key, so its softmax is 1: a constant per clip (`Given.context`), added, not attended to.
- `α·spatial + (1 − α)·temporal` is `spatial + (1 − α)·h` where the temporal block is `spatial + h`: 1 − α is in its weights.
- Temporal convolutions are 2-D, (3, 1) over (frames, places); the time embedding is part of a convolution's bias (`Given.biases`).
- On CPUs a 3 × 3 convolution in float32 takes half the products (`winograd`).
- Nearest ×2 and 3 × 3 convolution are four 2 × 2 convolutions before the enlargement (4/9 of the products).
- Activations are channels-last throughout: tokens are a view. Work goes piece by piece, so that what lies between two
  matrix products is small; sums over all of a clip (group norms over time) are gathered first.

Shapes: R rows (clips, or two per clip under guidance), F frames, N = R·F, C channels, H × W places, S = H·W, k heads of d.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelflow.pipelines.svd import winograd

GROUPS = 32
CPU_PIECE, PIECE = 4 * 2**20, 2**30
"""Bytes of the largest tensor between two products: on a CPU what its cache holds, elsewhere what memory can spare."""
THRIFTY_PIECE = 2**26


class Care(NamedTuple):
    """How memory is spent. piece: bytes in place of the above.  again: compute the first temporal convolution twice, instead of
    keeping what it gives for the whole clip, and write frames in the place of those that they come from.
    """

    piece: int | None = None
    again: bool = False


_care: ContextVar[Care] = ContextVar("care", default=Care())  # noqa: B039 - a tuple


def care() -> Care:
    return _care.get()


@contextmanager
def caring(how: Care) -> Iterator[None]:
    """Spend memory so, inside."""
    token = _care.set(how)
    try:
        yield
    finally:
        _care.reset(token)


class Given(NamedTuple):
    """What all blocks read in one pass."""

    frames: int
    biases: Tensor
    """(sum of channels,): convolution biases with the embedding of time, fps, motion and noise in them."""
    context: Tensor
    """(R, sum of channels): what cross-attention adds, its output's bias included."""
    positions: Tensor
    """(F, sum of channels): embeddings of the frames' places in time."""
    eps: float | None = None
    """Of the group norms in residual blocks; None: each as it was built."""


class Columns:
    """Hands out places in a table."""

    def __init__(self) -> None:
        self.total = 0

    def take(self, count: int) -> slice:
        self.total += count
        return slice(self.total - count, self.total)


def step_of(x: Tensor, values: int) -> int:
    """How many rows of `values` values fit into one piece."""
    piece = care().piece or (CPU_PIECE if x.device.type == "cpu" else PIECE)
    return max(1, piece // (values * x.element_size()))


def channels_last(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last), requires_grad=False)


def group_norm(x_NCHW: Tensor, norm: nn.GroupNorm, eps: float | None = None) -> Tensor:
    """On a CPU torch is slow over channels-last tensors of few places and few channels a group: there by products, or by way of others."""
    eps = norm.eps if eps is None else eps
    if x_NCHW.device.type == "cpu" and x_NCHW[0, 0].numel() < 1024:
        if x_NCHW.dtype != torch.float64 and x_NCHW.shape[1] <= 4 * GROUPS:
            return _product_norm(x_NCHW, norm, eps)
        if x_NCHW.dtype == torch.bfloat16 and x_NCHW.shape[1] <= 10 * GROUPS:
            found = F.group_norm(x_NCHW.contiguous(), GROUPS, norm.weight, norm.bias, eps)
            return found.contiguous(memory_format=torch.channels_last)
    return F.group_norm(x_NCHW, GROUPS, norm.weight, norm.bias, eps)


def _product_norm(x_NCHW: Tensor, norm: nn.GroupNorm, eps: float) -> Tensor:
    """Group norm whose means over places are matrix products, in float32."""
    x_NSC = tokens(x_NCHW).float()
    count, places, channels = x_NSC.shape
    mean_N1S = x_NSC.new_full((count, 1, places), 1 / places)

    def averaged(values_NSC: Tensor) -> Tensor:
        return torch.bmm(mean_N1S, values_NSC).unflatten(2, (GROUPS, -1)).mean(3, keepdim=True)  # (N, 1, G, 1)

    x_NSC = x_NSC - averaged(x_NSC).expand(-1, -1, -1, channels // GROUPS).flatten(2)
    rate = torch.rsqrt(averaged(x_NSC.square()) + eps) * norm.weight.float().unflatten(0, (GROUPS, -1))
    x_NSC = x_NSC.mul_(rate.flatten(2)).add_(norm.bias.float())
    return x_NSC.to(x_NCHW.dtype).unflatten(1, x_NCHW.shape[2:]).permute(0, 3, 1, 2)


def tokens(x_NCHW: Tensor) -> Tensor:
    """(N, S, C), a view."""
    return x_NCHW.permute(0, 2, 3, 1).flatten(1, 2)


class Convolution(nn.Module):
    """A convolution with channels-last weights; `bias` replaces its own. Its 3-D kernels (3, 1, 1) become (3, 1)."""

    def __init__(self, conv: Any, scale: float = 1.0):
        super().__init__()
        weight = conv.weight.detach() * scale if scale != 1 else conv.weight.detach()
        self.weight = channels_last(weight.squeeze(-1) if weight.ndim == 5 else weight)
        self.bias = nn.Parameter(conv.bias.detach() * scale, requires_grad=False)
        self.stride, self.padding = conv.stride[:2], conv.padding[:2]
        self.square = tuple(self.weight.shape[2:]) == (3, 3) and self.stride == self.padding == (1, 1)

    def forward(self, x_NCHW: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = self.bias if bias is None else bias
        if self.square and winograd.pays(x_NCHW, self.weight):
            return winograd.convolve(x_NCHW, self.weight, bias, step_of(x_NCHW, x_NCHW[0, :, 0].numel()))
        return F.conv2d(x_NCHW, self.weight, bias, self.stride, self.padding)


class Activation(nn.Module):
    """SiLU of a group norm. eps: in place of the norm's own."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x_NCHW: Tensor, eps: float | None = None) -> Tensor:
        return F.silu(group_norm(x_NCHW, self.norm, eps), inplace=True)


class Upsample(nn.Module):
    """Nearest ×2 and a 3 × 3 convolution.

    An even row of the result sees the row above its source and the source, an odd one the source and the row below: kernels
    (w₀, w₁ + w₂) and (w₀ + w₁, w₂); likewise in columns. All four are computed as channels of one 2 × 2 convolution, on one
    place more in each direction, and interleaved.
    """

    def __init__(self, upsampler: Any):
        super().__init__()
        weight = upsampler.conv.weight.detach().double()

        def halves(w: Tensor, axis: int) -> tuple[Tensor, Tensor]:
            first, middle, last = w.unbind(axis)
            return torch.stack((first, middle + last), axis), torch.stack((first + middle, last), axis)

        kernels = [columns for rows in halves(weight, 2) for columns in halves(rows, 3)]
        self.weight = channels_last(torch.cat(kernels).to(upsampler.conv.weight.dtype))
        self.bias = upsampler.conv.bias.requires_grad_(False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        count, height, width = x_NCHW.shape[0], *x_NCHW.shape[2:]
        four = F.conv2d(x_NCHW, self.weight, self.bias.repeat(4), padding=1).unflatten(1, (4, -1))
        out = four.new_empty(count, 2 * height, 2 * width, four.shape[2]).permute(0, 3, 1, 2)
        for phase in range(4):
            row, column = divmod(phase, 2)
            out[:, :, row::2, column::2] = four[:, phase, :, row : row + height, column : column + width]
        return out


class Residual(nn.Module):
    """A spatial residual block, and, where the source is a `SpatioTemporalResBlock`, a temporal one after it."""

    def __init__(self, block: Any, columns: Columns | None = None):
        super().__init__()
        spatial = getattr(block, "spatial_res_block", block)
        self.activation1, self.activation2 = Activation(spatial.norm1), Activation(spatial.norm2)
        self.conv1, self.conv2 = Convolution(spatial.conv1), Convolution(spatial.conv2)
        self.shortcut = Convolution(spatial.conv_shortcut) if spatial.conv_shortcut is not None else None
        temporal: Any = getattr(block, "temporal_res_block", None)
        self.timed = temporal is not None
        if self.timed:
            mixer = block.time_mixer
            share = torch.sigmoid(mixer.mix_factor.detach().double())
            self.time_activation1, self.time_activation2 = Activation(temporal.norm1), Activation(temporal.norm2)
            self.time_conv1 = Convolution(temporal.conv1)
            self.time_conv2 = Convolution(temporal.conv2, float(share if mixer.switch_spatial_to_temporal_mix else 1 - share))
        self.projections: Any = nn.ModuleList()
        if columns is not None:
            both = spatial.time_emb_proj, temporal.time_emb_proj
            self.projections.extend(both)
            self.places = tuple(columns.take(projection.out_features) for projection in both)

    def biases(self, silu_embedding: Tensor) -> list[Tensor]:
        """Biases of the two first convolutions, (…, C) each, of embeddings (…, T) after their SiLU."""
        convolutions = (self.conv1, self.time_conv1)
        return [
            projection(silu_embedding) + convolution.bias
            for projection, convolution in zip(self.projections, convolutions, strict=True)
        ]

    def forward(self, x_NCHW: Tensor, given: Given) -> Tensor:
        spatial, temporal = (given.biases[place] for place in self.places)
        step = step_of(x_NCHW, x_NCHW[0].numel())
        pieces = [self.spatial(piece, spatial, given.eps) for piece in x_NCHW.split(step)]
        x_NCHW = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        self.temporal_(x_NCHW, given.frames, temporal, given.eps)
        return x_NCHW

    def spatial(self, x_NCHW: Tensor, bias: Tensor | None = None, eps: float | None = None, out: Tensor | None = None) -> Tensor:
        h = self.conv1(self.activation1(x_NCHW, eps), bias)
        h = self.conv2(self.activation2(h, eps))
        return torch.add(h, x_NCHW if self.shortcut is None else self.shortcut(x_NCHW), out=h if out is None else out)

    def temporal_(self, x_NCHW: Tensor, frames: int, bias: Tensor | None = None, eps: float | None = None) -> None:
        """Add the temporal block to `x`, in place."""
        if not self.timed:
            return
        x_RCFS = x_NCHW.permute(0, 2, 3, 1).unflatten(0, (-1, frames)).flatten(2, 3).permute(0, 3, 1, 2)
        if step_of(x_RCFS, x_RCFS[..., 0].numel()) >= x_RCFS.shape[3]:
            h_RCFS = self.time_conv1(self.time_activation1(x_RCFS, eps), bias)
            x_RCFS.add_(self.time_conv2(self.time_activation2(h_RCFS, eps)))
            return
        for row_1CFS in x_RCFS.split(1):
            self._row_temporal_(row_1CFS, bias, eps)

    def _row_temporal_(self, x_1CFS: Tensor, bias: Tensor | None, eps: float | None) -> None:
        step = step_of(x_1CFS, x_1CFS[..., 0].numel())
        first = _affine(x_1CFS.split(step_of(x_1CFS, x_1CFS[:, :, 0].numel()), 2), self.time_activation1.norm, eps)

        def inner() -> Iterator[Tensor]:
            for piece in x_1CFS.split(step, 3):
                yield self.time_conv1(_activated(piece, *first), bias)

        pieces = inner if care().again else list(inner()).__iter__
        second = _affine(pieces(), self.time_activation2.norm, eps)
        for x, piece in zip(x_1CFS.split(step, 3), pieces(), strict=True):
            x.add_(self.time_conv2(_activated(piece, *second)))


def _activated(x_1CFS: Tensor, scale_C: Tensor, shift_C: Tensor) -> Tensor:
    """SiLU of a group norm, given as scale and shift; rounded once where x is coarser than these."""
    if x_1CFS.dtype == scale_C.dtype:
        moved = torch.addcmul(shift_C.view(1, -1, 1, 1), x_1CFS, scale_C.view(1, -1, 1, 1))
    else:
        x_1CFS = x_1CFS.contiguous(memory_format=torch.channels_last)  # of a piece, without which the norm is slow
        moved = F.batch_norm(x_1CFS, torch.zeros_like(scale_C), torch.ones_like(scale_C), scale_C, shift_C, eps=0.0)
    return F.silu(moved, inplace=True)


def _affine(pieces: Iterable[Tensor], norm: nn.GroupNorm, eps: float | None) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,), float32 or finer, that a group norm over all pieces (1, C, F, …) of a clip comes to."""
    moments, counts = [], []
    for piece in pieces:
        room = piece.new_empty(2, piece.shape[1], dtype=torch.promote_types(piece.dtype, torch.float32))
        moments.append(torch.stack(torch.ops.aten.batch_norm_update_stats(piece, *room, 1.0)))  # by channel: mean, mean square about it
        counts.append(piece[0, 0].numel())
    mean_PGc, spread_PGc = torch.stack(moments, 1).unflatten(2, (GROUPS, -1))
    share_P11 = torch.stack([mean_PGc.new_full((1, 1), count / sum(counts)) for count in counts])  # not from the host's memory
    mean_G1 = (share_P11 * mean_PGc).sum(0).mean(1, keepdim=True)
    spread_G1 = (share_P11 * (spread_PGc + (mean_PGc - mean_G1).square())).sum(0).mean(1, keepdim=True)
    rate_G1 = torch.rsqrt(spread_G1 + (norm.eps if eps is None else eps))
    scale_Gc = rate_G1 * norm.weight.to(rate_G1.dtype).unflatten(0, (GROUPS, -1))
    return scale_Gc.flatten(), norm.bias.to(rate_G1.dtype) - (mean_G1 * scale_Gc).flatten()


__all__ = ["Activation", "Care", "Columns", "Convolution", "Given", "Residual", "Upsample", "care", "caring"]
