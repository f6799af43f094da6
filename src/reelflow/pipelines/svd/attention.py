"""The transformers of Stable Video Diffusion's UNet, rearranged as `blocks` says.

Shapes: as in `blocks`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelflow.pipelines.svd.blocks import Columns, Given, group_norm, step_of, tokens


class FeedForward(nn.Module):
    """LayerNorm, GEGLU and projection, added in place, row by row."""

    def __init__(self, norm: nn.LayerNorm, feed_forward: Any):
        super().__init__()
        self.norm, (self.up, _, self.down) = norm, feed_forward.net
        self.up = self.up.proj

    def add_(self, x_LC: Tensor) -> None:
        for piece in x_LC.split(step_of(x_LC, len(self.up.weight))):
            piece += self(piece)

    def forward(self, x_LC: Tensor) -> Tensor:
        value_weight, gate_weight = self.up.weight.chunk(2)
        value_bias, gate_bias = self.up.bias.chunk(2)
        normed = self.norm(x_LC)
        gate = F.gelu(F.linear(normed, gate_weight, gate_bias))
        return self.down(F.linear(normed, value_weight, value_bias).mul_(gate))


class SelfAttention(nn.Module):
    """LayerNorm and self-attention, queries, keys and values by one product; and the constant of the cross-attention after it."""

    def __init__(self, block: Any, columns: Columns):
        super().__init__()
        own, cross = block.attn1, block.attn2
        self.norm, self.heads = block.norm1, own.heads
        weight = torch.cat([projection.weight.detach() for projection in (own.to_q, own.to_k, own.to_v)])
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.out = own.to_out[0]
        self.cross_value, self.cross_out = cross.to_v, cross.to_out[0]
        self.place = columns.take(self.out.out_features)

    def context(self, states_RE: Tensor) -> Tensor:
        """(R, C): what is added to every token of a row besides its attention."""
        return self.cross_out(self.cross_value(states_RE)) + self.out.bias

    def forward(self, x_LMC: Tensor) -> Tensor:
        """Attention over M, without the output's bias."""
        batch, length, channels = x_LMC.shape
        qkv = F.linear(self.norm(x_LMC), self.weight).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, channels)
        return F.linear(mixed, self.out.weight)


class Spatial(nn.Module):
    """A `BasicTransformerBlock`: places of a frame attend to each other."""

    def __init__(self, block: Any, columns: Columns):
        super().__init__()
        self.attention, self.feed_forward = SelfAttention(block, columns), FeedForward(block.norm3, block.ff)

    def run_(self, x_NSC: Tensor, given: Given) -> None:
        constant = given.context[:, self.attention.place]
        step = min(given.frames, step_of(x_NSC, 3 * x_NSC[0].numel()))
        for row, x_FSC in enumerate(x_NSC.split(given.frames)):
            for piece in x_FSC.split(step):
                piece += self.attention(piece).add_(constant[row])
        self.feed_forward.add_(x_NSC.flatten(0, 1))


class Temporal(nn.Module):
    """A `TemporalBasicTransformerBlock`: frames of a place attend to each other."""

    def __init__(self, block: Any, columns: Columns):
        super().__init__()
        self.first = FeedForward(block.norm_in, block.ff_in)
        self.attention, self.feed_forward = SelfAttention(block, columns), FeedForward(block.norm3, block.ff)

    def run_(self, x_NSC: Tensor, given: Given) -> None:
        constant = given.context[:, self.attention.place]
        self.first.add_(x_NSC.flatten(0, 1))
        step = step_of(x_NSC, 3 * given.frames * x_NSC.shape[2])
        for row, x_FSC in enumerate(x_NSC.split(given.frames)):
            for piece in x_FSC.split(step, dim=1):
                mixed = self.attention(piece.transpose(0, 1).contiguous())
                piece += mixed.add_(constant[row]).transpose(0, 1)
        self.feed_forward.add_(x_NSC.flatten(0, 1))


class Transformer(nn.Module):
    """A `TransformerSpatioTemporalModel`."""

    def __init__(self, model: Any, spatial: Columns, context: Columns):
        super().__init__()
        self.norm, self.proj_in, self.proj_out = model.norm, model.proj_in, model.proj_out
        self.time_proj, self.time_pos_embed = model.time_proj, model.time_pos_embed
        self.spatial: Any = nn.ModuleList(Spatial(block, context) for block in model.transformer_blocks)
        self.temporal: Any = nn.ModuleList(Temporal(block, context) for block in model.temporal_transformer_blocks)
        self.share = float(torch.sigmoid(model.time_mixer.mix_factor.detach().double()))
        self.place = spatial.take(model.in_channels)

    def positions(self, frames: int) -> Tensor:
        """(F, C)."""
        weight = self.proj_in.weight
        places = self.time_proj(torch.arange(frames, device=weight.device))
        return self.time_pos_embed(places.to(weight.dtype))

    def forward(self, x_NCHW: Tensor, given: Given) -> Tensor:
        height, width = x_NCHW.shape[2:]
        y_NSC = self.proj_in(tokens(group_norm(x_NCHW, self.norm)))
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            spatial.run_(y_NSC, given)
            z_NSC = (y_NSC.unflatten(0, (-1, given.frames)) + given.positions[:, None, self.place]).flatten(0, 1)
            temporal.run_(z_NSC, given)
            y_NSC = z_NSC.lerp_(y_NSC, self.share)
        return self.proj_out(y_NSC).unflatten(1, (height, width)).permute(0, 3, 1, 2).add_(x_NCHW)


__all__ = ["FeedForward", "SelfAttention", "Transformer"]
