"""The VAE of Stable Video Diffusion with gradients: whole clips in, whole clips out.

Shapes: B clips, C channels, F frames, H × W pixels, h × w latent places, N = B·F.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reelflow.training.svd.blocks import (
    activation,
    enlarged,
    normed,
    over_time,
    residual,
    scaled_dot_product,
    spatial_residual,
    time_convolution,
    tokens,
)


class TemporalPass:
    """Encoder and decoder of an `AutoencoderKLTemporalDecoder`, from its own parameters."""

    def __init__(self, vae: Any):
        self.vae, self.activate = vae, activation()

    def encode(self, x_B3FHW: Tensor) -> Tensor:
        """Pixels −1 … 1 to mean and log-variance (B, 2C, F, h, w), frame by frame."""
        encoder, clips = self.vae.encoder, len(x_B3FHW)
        x = encoder.conv_in(x_B3FHW.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last))
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                x = spatial_residual(resnet, x, self.activate)
            if block.downsamplers:
                x = block.downsamplers[0].conv(F.pad(x, (0, 1, 0, 1)))
        x = spatial_residual(encoder.mid_block.resnets[0], x, self.activate)
        for attention, resnet in zip(encoder.mid_block.attentions, encoder.mid_block.resnets[1:], strict=True):
            x = spatial_residual(resnet, frame_attention(attention, x), self.activate)
        x = self.vae.quant_conv(encoder.conv_out(self.activate(x, encoder.conv_norm_out)))
        return x.unflatten(0, (clips, -1)).transpose(1, 2)

    def decode(self, z_BCFhw: Tensor) -> Tensor:
        """Latents, not scaled, to pixels (B, 3, F, H, W)."""
        decoder, frames = self.vae.decoder, z_BCFhw.shape[2]
        x = decoder.conv_in(z_BCFhw.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last))
        first, *rest = decoder.mid_block.resnets
        x = residual(first, x, frames, self.activate)
        for attention, resnet in zip(decoder.mid_block.attentions, rest, strict=False):  # diffusers leaves out resnets without one
            x = residual(resnet, frame_attention(attention, x), frames, self.activate)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = residual(resnet, x, frames, self.activate)
            if block.upsamplers:
                x = enlarged(x, block.upsamplers[0])
        x = decoder.conv_out(self.activate(x, decoder.conv_norm_out))
        y_B3FS = time_convolution(over_time(x, frames), decoder.time_conv_out)
        return y_B3FS.unflatten(3, x.shape[2:])


def frame_attention(attention: Any, x_NCHW: Tensor) -> Tensor:
    """Attention over the places of a frame, added."""
    y_NSC = tokens(normed(x_NCHW, attention.group_norm))
    layers = attention.to_q, attention.to_k, attention.to_v
    q, k, v = (layer(y_NSC).unflatten(2, (attention.heads, -1)).transpose(1, 2) for layer in layers)
    y_NSC = attention.to_out[0](scaled_dot_product(q, k, v).transpose(1, 2).flatten(2))
    return x_NCHW + y_NSC.unflatten(1, x_NCHW.shape[2:]).permute(0, 3, 1, 2)


__all__ = ["TemporalPass"]
