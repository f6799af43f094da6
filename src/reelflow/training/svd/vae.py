"""Train the small VAE of `mini-svd` (`AutoencoderKLTemporalDecoder`) on toybox clips, and export it as a diffusers folder.

    python -m reelflow.training.svd.vae runs/svd-vae --export runs/svd-vae/vae
    torchrun --nproc-per-node 2 -m reelflow.training.svd.vae runs/svd-vae --export runs/svd-vae/vae      # one thread each

The loop, its options and what makes a stopped run continue exactly are those of `training.vae`. The latents are scaled as
Stable Diffusion scales them: by one number, `scaling_factor`, that makes their root mean square 1.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from reelflow.training.allocator import keep_freed_memory
from reelflow.training.svd.codec import TemporalPass
from reelflow.training.vae import Kind, main
from reelflow.training.vae_batches import VaeTraining

WIDTHS = (64, 64, 96, 96, 96)
"""Of the levels, the finest first: group norms have 32 groups, and groups of one channel forget how bright a frame is."""
CHANNELS = 16


def new_vae(widths: tuple[int, ...] = WIDTHS, channels: int = CHANNELS) -> AutoencoderKLTemporalDecoder:
    """The untrained VAE: 16x in space, 16 channels, every frame by itself; the decoder also sees frames before and after."""
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=widths, layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * len(widths), latent_channels=channels,
        sample_size=128,
    )  # fmt: skip
    vae.quant_conv.bias.data[channels:] = -6.0  # begin with little noise: with unit noise the decoder learns to ignore the latents
    begin_plainly(vae)
    return vae


@torch.no_grad()
def begin_plainly(vae: Any) -> None:
    """Have an untrained VAE pass on mean colours: residual blocks add nothing yet, places are averaged on the way down and repeated on
    the way up, frames stay as they are. From random convolutions it takes hundreds of steps to find that way through the norms.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D | TemporalResnetBlock):
            module.conv2.weight.zero_()
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module is not vae.quant_conv:
            assert module.bias is not None
            module.bias.zero_()
        if isinstance(module, Downsample2D):
            eye = torch.eye(module.conv.out_channels, module.conv.in_channels)
            module.conv.weight.zero_()[:, :, :2, :2] = eye[:, :, None, None] / 4
        if isinstance(module, Upsample2D):
            nn.init.dirac_(module.conv.weight)
    nn.init.dirac_(vae.decoder.time_conv_out.weight)
    vae.encoder.conv_out.weight.mul_(3)


def frames_of(x_B3FHW: Tensor) -> Tensor:
    """(N, 3, H, W)."""
    return x_B3FHW.transpose(1, 2).flatten(0, 1)


def latents_of(vae: Any, x_B3FHW: Tensor) -> Tensor:
    """Their mode (B, C, F, h, w), not scaled."""
    found: Tensor = vae.encode(frames_of(x_B3FHW)).latent_dist.mode()
    return found.unflatten(0, (len(x_B3FHW), -1)).transpose(1, 2)


def reconstruct(vae: Any, x_B3FHW: Tensor) -> Tensor:
    """Pixels (B, 3, F, H, W) through encoder and decoder, clip by clip."""
    found: Tensor = vae.decode(frames_of(latents_of(vae, x_B3FHW)), num_frames=x_B3FHW.shape[2]).sample
    return found.unflatten(0, (len(x_B3FHW), -1)).transpose(1, 2)


def note(vae: Any, mean: Tensor, std: Tensor, floor: float) -> None:
    vae.register_to_config(scaling_factor=round(float((mean.square() + std.square()).mean().rsqrt()), 5))


SVD = Kind(
    "the small VAE of Stable Video Diffusion", new_vae, AutoencoderKLTemporalDecoder.from_pretrained,
    lambda vae, fused: TemporalPass(vae), reconstruct, latents_of, note,
    VaeTraining(
        pixels=16 * 64 * 64, shapes=((1, 64), (2, 64), (4, 64), (8, 64)), last_shapes=((1, 128), (4, 128), (14, 64)), last_share=0.35,
        foreground=6, knee=0.1,
    ),
    frames=2,
)  # fmt: skip

if __name__ == "__main__":
    keep_freed_memory()
    main(SVD)
