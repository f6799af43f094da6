"""The UNet of Stable Video Diffusion with gradients.

Shapes: R clips, F frames, h × w latent places, C channels, E channels of CLIP's embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from reelflow.training.svd.blocks import Activation, activation, enlarged, residual, transformer

DEAD = (".attn2.to_q.", ".attn2.to_k.", ".norm2.")
"""Parts of transformer blocks that attention to one key leaves without effect, and so without gradient."""


def velocity(
    unet: Any, x_RFChw: Tensor, times_R: Tensor, states_RE: Tensor, ids_R3: Tensor, activate: Activation, recompute: bool = False
) -> Tensor:
    """v (R, F, C, h, w): what a `UNetSpatioTemporalConditionModel` answers.

    Args:
        x_RFChw: latents times c_in, and the picture's latents, side by side as channels.
        times_R: 0.25 ln σ.
        states_RE: CLIP's embedding.
        ids_R3: fps − 1, motion, noise level of the picture.
        activate: SiLU of the group norms in residual blocks.
        recompute: keep each layer's input alone, and compute the rest again on the way back.
    """
    frames, kind = x_RFChw.shape[1], unet.conv_in.weight.dtype
    told_RT = unet.add_embedding(unet.add_time_proj(ids_R3.flatten()).unflatten(0, (-1, 3)).flatten(1).to(kind))
    silu_RT = F.silu(unet.time_embedding(unet.time_proj(times_R).to(kind)) + told_RT)

    def layer(block: Any, index: int, x_NCHW: Tensor) -> Tensor:
        if recompute and torch.is_grad_enabled():
            found: Tensor = checkpoint(plain, block, index, x_NCHW, use_reentrant=False)
            return found
        return plain(block, index, x_NCHW)

    def plain(block: Any, index: int, x_NCHW: Tensor) -> Tensor:
        x_NCHW = residual(block.resnets[index], x_NCHW, frames, activate, silu_RT)
        attentions = getattr(block, "attentions", ())
        return transformer(attentions[index], x_NCHW, states_RE, frames) if index < len(attentions) else x_NCHW

    x = unet.conv_in(x_RFChw.flatten(0, 1).contiguous(memory_format=torch.channels_last))
    skips = [x]
    for block in unet.down_blocks:
        for index in range(len(block.resnets)):
            x = layer(block, index, x)
            skips.append(x)
        if block.downsamplers:
            x = block.downsamplers[0].conv(x)
            skips.append(x)
    for index in range(len(unet.mid_block.resnets)):
        x = layer(unet.mid_block, index, x)
    for block in unet.up_blocks:
        for index in range(len(block.resnets)):
            x = layer(block, index, torch.cat((x, skips.pop()), 1))
        if block.upsamplers:
            x = enlarged(x, block.upsamplers[0])
    return unet.conv_out(activation()(x, unet.conv_norm_out)).unflatten(0, (-1, frames))


def flops(unet: Any, frames: int, height: int, width: int) -> float:
    """Of matrix products and convolutions, forward, for one clip of latents; counted by torch on a copy without values."""
    with torch.device("meta"):
        copy = type(unet).from_config(unet.config).to("meta")  # blends are made where they are, whatever the context
        x = torch.empty(1, frames, unet.config.in_channels, height, width)
        states = torch.empty(1, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            velocity(copy, x, torch.empty(1), states, torch.empty(1, 3), activation())
    return float(counter.get_total_flops())


def trained(unet: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that have an effect, by name."""
    return {name: p for name, p in unet.named_parameters() if not ("transformer_blocks." in name and any(part in name for part in DEAD))}


__all__ = ["flops", "trained", "velocity"]
