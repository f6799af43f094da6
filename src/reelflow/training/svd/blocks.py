"""The blocks of Stable Video Diffusion with gradients: diffusers' modules and numbers, in an order that suits training on any device.

Everything is computed from the parameters of the diffusers modules themselves, so gradients arrive where diffusers' own
forward would leave them (but for queries, keys and norm of attention to one key, which change nothing). Against that forward:

- activations are channels-last throughout, temporal convolutions two-dimensional, (3, 1) over (frames, places);
- attention to the one key of CLIP is a constant per clip; `α·spatial + (1 − α)·temporal` is `spatial + (1 − α)·h`;
- nearest ×2 with a 3 × 3 convolution is four 2 × 2 convolutions before the enlargement;
- under autocast products are bfloat16, norms and the residual stream float32.

`pipelines.svd.blocks` says the same of sampling, where work is done in place and weights are folded.

Shapes: R clips, F frames, N = R·F, C channels, H × W places, S = H·W, E channels of CLIP's embedding, T of the time embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor, nn.GroupNorm], Tensor]
"""SiLU of a group norm."""


def normed(x_NCHW: Tensor, norm: nn.GroupNorm, eps: float | None = None) -> Tensor:
    """Group norm in float32 (float64 stays)."""
    x = x_NCHW if x_NCHW.dtype == torch.float64 else x_NCHW.float()
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps if eps is None else eps)


def activation(eps: float | None = None, fused: bool = False) -> Activation:
    """SiLU of a group norm, float32. eps: in place of the norm's own. fused: compiled (a C++ compiler or Triton is needed)."""
    function = _compiled() if fused else _activated

    def activated(x_NCHW: Tensor, norm: nn.GroupNorm) -> Tensor:
        return function(x_NCHW, norm.weight, norm.bias, norm.num_groups, norm.eps if eps is None else eps)

    return activated


def _activated(x_NCHW: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    x = x_NCHW if x_NCHW.dtype == torch.float64 else x_NCHW.float()
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


@cache
def _compiled() -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(_activated, dynamic=False)


def tokens(x_NCHW: Tensor) -> Tensor:
    """(N, S, C), a view."""
    return x_NCHW.permute(0, 2, 3, 1).flatten(1, 2)


def over_time(x_NCHW: Tensor, frames: int) -> Tensor:
    """(R, C, F, S), a view: a clip as one picture of frames × places."""
    return x_NCHW.permute(0, 2, 3, 1).unflatten(0, (-1, frames)).flatten(2, 3).permute(0, 3, 1, 2)


def time_convolution(x_RCFS: Tensor, conv: nn.Conv3d) -> Tensor:
    return F.conv2d(x_RCFS, conv.weight.squeeze(-1), conv.bias, padding=(1, 0))


def enlarged(x_NCHW: Tensor, upsampler: Any) -> Tensor:
    """Nearest ×2 and a 3 × 3 convolution; see `pipelines.svd.blocks.Upsample`."""
    weight, bias = upsampler.conv.weight, upsampler.conv.bias

    def halves(w: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        first, middle, last = w.unbind(axis)
        return torch.stack((first, middle + last), axis), torch.stack((first + middle, last), axis)

    kernels = [columns for rows in halves(weight, 2) for columns in halves(rows, 3)]
    four = F.conv2d(x_NCHW, torch.cat(kernels), bias.repeat(4), padding=1).unflatten(1, (4, -1))
    height, width = x_NCHW.shape[2:]
    phases = [four[:, phase, :, phase // 2 :, phase % 2 :][:, :, :height, :width].permute(0, 2, 3, 1) for phase in range(4)]
    rows = [torch.stack(pair, 3).flatten(2, 3) for pair in (phases[:2], phases[2:])]  # (N, H, 2W, C) of even and of odd rows
    return torch.stack(rows, 2).flatten(1, 2).permute(0, 3, 1, 2)


def share_of_time(mixer: Any) -> Tensor:
    """How much of the temporal block is added to the spatial one."""
    share = torch.sigmoid(mixer.mix_factor)
    return share if mixer.switch_spatial_to_temporal_mix else 1 - share


def spatial_residual(block: Any, x_NCHW: Tensor, activate: Activation, bias_NC11: Tensor | None = None) -> Tensor:
    """A `ResnetBlock2D`; bias: of the time embedding."""
    h = block.conv1(activate(x_NCHW, block.norm1))
    if bias_NC11 is not None:
        h = h + bias_NC11
    h = block.conv2(activate(h, block.norm2))
    return h + (x_NCHW if block.conv_shortcut is None else block.conv_shortcut(x_NCHW))


def residual(block: Any, x_NCHW: Tensor, frames: int, activate: Activation, silu_RT: Tensor | None = None) -> Tensor:
    """A `SpatioTemporalResBlock`. silu_RT: SiLU of the time embedding, of a UNet."""
    spatial, temporal = block.spatial_res_block, block.temporal_res_block
    added: tuple[Tensor | None, Tensor | None] = (None, None)
    if silu_RT is not None:
        own, other = spatial.time_emb_proj(silu_RT), temporal.time_emb_proj(silu_RT)
        added = own.repeat_interleave(frames, 0)[:, :, None, None], other[:, :, None, None]
    x_NCHW = spatial_residual(spatial, x_NCHW, activate, added[0])
    x_RCFS = over_time(x_NCHW, frames)
    h = time_convolution(activate(x_RCFS, temporal.norm1), temporal.conv1)
    if added[1] is not None:
        h = h + added[1]
    h = time_convolution(activate(h, temporal.norm2), temporal.conv2)
    x_RCFS = x_RCFS + share_of_time(block.time_mixer) * h
    return x_RCFS.permute(0, 2, 3, 1).flatten(0, 1).unflatten(1, x_NCHW.shape[2:]).permute(0, 3, 1, 2)


def attended(attention: Any, x_LMC: Tensor) -> Tensor:
    """Self-attention over M."""
    layers = attention.to_q, attention.to_k, attention.to_v
    q, k, v = (layer(x_LMC).unflatten(2, (attention.heads, -1)).transpose(1, 2) for layer in layers)
    return attention.to_out[0](scaled_dot_product(q, k, v).transpose(1, 2).flatten(2))


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention (…, M, d). On a CPU torch's fused one takes ten times as long on its way back where sequences are short."""
    if q.device.type != "cpu" or q.shape[-2] > 256:
        return F.scaled_dot_product_attention(q, k, v)
    return torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, -1) @ v


def to_one_key(attention: Any, states_RE: Tensor) -> Tensor:
    """(R, C): what attention to one key gives every query."""
    return attention.to_out[0](attention.to_v(states_RE))


def fed_forward(feed_forward: Any, x: Tensor) -> Tensor:
    value, gate = feed_forward.net[0].proj(x).chunk(2, -1)
    return feed_forward.net[2](value * F.gelu(gate))


def spatial_transformer(block: Any, x_NSC: Tensor, states_RE: Tensor, frames: int) -> Tensor:
    """A `BasicTransformerBlock`."""
    constant = to_one_key(block.attn2, states_RE).repeat_interleave(frames, 0)[:, None]
    x_NSC = x_NSC + attended(block.attn1, block.norm1(x_NSC)) + constant
    return x_NSC + fed_forward(block.ff, block.norm3(x_NSC))


def temporal_transformer(block: Any, x_NSC: Tensor, states_RE: Tensor, frames: int) -> Tensor:
    """A `TemporalBasicTransformerBlock`."""
    x_NSC = x_NSC + fed_forward(block.ff_in, block.norm_in(x_NSC))
    x_RSFC = block.norm1(x_NSC).unflatten(0, (-1, frames)).transpose(1, 2)
    mixed = attended(block.attn1, x_RSFC.flatten(0, 1)).unflatten(0, x_RSFC.shape[:2]).transpose(1, 2).flatten(0, 1)
    x_NSC = x_NSC + mixed + to_one_key(block.attn2, states_RE).repeat_interleave(frames, 0)[:, None]
    return x_NSC + fed_forward(block.ff, block.norm3(x_NSC))


def transformer(model: Any, x_NCHW: Tensor, states_RE: Tensor, frames: int) -> Tensor:
    """A `TransformerSpatioTemporalModel`."""
    y_NSC = model.proj_in(tokens(normed(x_NCHW, model.norm)))
    places = model.time_proj(torch.arange(frames, device=x_NCHW.device)).to(model.time_pos_embed.linear_1.weight.dtype)
    positions = model.time_pos_embed(places).repeat(len(y_NSC) // frames, 1)[:, None]
    for spatial, temporal in zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True):
        y_NSC = spatial_transformer(spatial, y_NSC, states_RE, frames)
        z_NSC = temporal_transformer(temporal, y_NSC + positions, states_RE, frames)
        y_NSC = y_NSC + share_of_time(model.time_mixer) * (z_NSC - y_NSC)
    return x_NCHW + model.proj_out(y_NSC).unflatten(1, x_NCHW.shape[2:]).permute(0, 3, 1, 2)

