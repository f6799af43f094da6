"""The VAE of Stable Video Diffusion: one picture in, all frames of a clip out.

The decoder's parts that see one frame run frame by frame; those that see a place over time run piece by piece, with the
group norms' moments of the whole. Memory holds two tensors of a whole clip at most, thriftily one and a half, and no pixel depends on
the pieces.

Shapes: B clips, F frames, h × w latent places, H × W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelflow.pipelines.svd.blocks import Activation, Convolution, Residual, Upsample, care, group_norm, step_of, tokens


class Encoder(nn.Module):
    """Pixels (B, 3, H, W), −1 … 1, to the mode of their latents (B, 4, h, w), not scaled."""

    def __init__(self, vae: Any):
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        weight = self.quant_conv.weight
        return self.quant_conv(self.encoder(pixels_B3HW.to(weight.device, weight.dtype))).chunk(2, 1)[0]


class FrameAttention(nn.Module):
    """The decoder's one attention, over the places of a frame."""

    def __init__(self, attention: Any):
        super().__init__()
        self.attention = attention

    def forward(self, x_NCHW: Tensor) -> Tensor:
        a = self.attention
        y_NSC = tokens(group_norm(x_NCHW, a.group_norm))
        q, k, v = (layer(y_NSC).unflatten(2, (a.heads, -1)).transpose(1, 2) for layer in (a.to_q, a.to_k, a.to_v))
        y_NSC = a.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y_NSC.unflatten(1, x_NCHW.shape[2:]).permute(0, 3, 1, 2).add_(x_NCHW)


class Decoder(nn.Module):
    """Decoder of an `AutoencoderKLTemporalDecoder`, or of an `AutoencoderKL`, which sees every frame by itself."""

    def __init__(self, vae: Any):
        super().__init__()
        source = vae.decoder
        self.scaling_factor = vae.config.scaling_factor
        self.post_quant_conv = getattr(vae, "post_quant_conv", None)
        self.conv_in = Convolution(source.conv_in)
        first, *rest = source.mid_block.resnets
        self.spatial: Any = nn.ModuleList([nn.ModuleList([Residual(first)])])
        for attention, resnet in zip(source.mid_block.attentions, rest, strict=False):
            self.spatial.append(nn.ModuleList([FrameAttention(attention), Residual(resnet)]))
        self.spatial.extend(nn.ModuleList([Residual(resnet)]) for resnet in rest[len(source.mid_block.attentions) :])
        before: list[nn.Module] = []
        for block in source.up_blocks:
            for resnet in block.resnets:
                self.spatial.append(nn.ModuleList([*before, Residual(resnet)]))
                before = []
            before = [Upsample(block.upsamplers[0])] if block.upsamplers else []
        self.activation_out, self.conv_out = Activation(source.conv_norm_out), Convolution(source.conv_out)
        self.time_conv_out = Convolution(source.time_conv_out) if hasattr(source, "time_conv_out") else None

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def forward(self, latents_BF4hw: Tensor, progress: Callable[[float], None] = lambda share: None) -> Tensor:
        """Pixels (B, F, 3, H, W) float32 of scaled latents, about −1 … 1, clip by clip."""
        clips = []
        for index, latents_F4hw in enumerate(latents_BF4hw.to(self.conv_in.weight.device)):
            clips.append(self._clip(latents_F4hw / self.scaling_factor, lambda share: progress((index + share) / len(latents_BF4hw))))  # noqa: B023 - called at once
        return torch.stack(clips)

    def _clip(self, latents_F4hw: Tensor, progress: Callable[[float], None]) -> Tensor:
        x = latents_F4hw.to(self.dtype).contiguous(memory_format=torch.channels_last)
        frames = len(x)
        x = self.conv_in(x if self.post_quant_conv is None else self.post_quant_conv(x))
        growths = [4 if isinstance(stage[0], Upsample) else 1 for stage in self.spatial]
        work = list(accumulate(growths, mul))  # of each stage, as its places
        for index, (stage, growth) in enumerate(zip(self.spatial, growths, strict=True)):
            x = by_frames(x, partial(_run, stage), growth)
            stage[-1].temporal_(x, frames)
            progress(sum(work[: index + 1]) / sum(work))
        x = by_frames(x, lambda piece, out: self.conv_out(self.activation_out(piece)))
        if self.time_conv_out is not None:
            x = self.time_conv_out(x.permute(1, 0, 2, 3).flatten(2)[None])[0].unflatten(2, x.shape[2:]).permute(1, 0, 2, 3)
        return x.float()


def _run(stage: Any, x_NCHW: Tensor, out: Tensor | None) -> Tensor:
    *before, residual = stage
    for module in before:
        x_NCHW = module(x_NCHW)
    return residual.spatial(x_NCHW, out=out)


def by_frames(x_NCHW: Tensor, function: Callable[[Tensor, Tensor | None], Tensor], growth: int = 1) -> Tensor:
    """Apply a function of single frames to a few at a time; thriftily in the place of `x`, where the result fits there.

    Args:
        function: of frames and, once it is known, of the place for what it makes of them, which it may use.
        growth: how many times as large the function's largest tensor is.
    """
    whole, start = None, 0
    for piece in x_NCHW.split(step_of(x_NCHW, growth * x_NCHW[0].numel())):
        place = None if whole is None else whole[start : start + len(piece)]
        part = function(piece, place)
        if len(part) == len(x_NCHW):
            return part
        if whole is None and care().again and part.shape[1:] == x_NCHW.shape[1:]:
            whole = x_NCHW
        elif whole is None:
            whole = part.new_empty(len(x_NCHW), *part.shape[2:], part.shape[1]).permute(0, 3, 1, 2)
        if part is not place:
            whole[start : start + len(part)] = part
        start += len(part)
    assert whole is not None
    return whole


__all__ = ["Decoder", "Encoder"]
