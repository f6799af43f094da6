"""`AutoencoderKLWan` over a whole clip at once: the same function, differentiable, and several times faster.

diffusers runs it chunk by chunk with a feature cache. Tensors are (B, C, F, H, W) with channels-last memory, so that
(B, F, H, W, C) is a view. Shape suffixes: B batch, C channels, F frames, T latent frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def channels_last(vae: nn.Module) -> None:
    """Lay the convolution weights out channels-last, in place: what the CPU kernels and the passes below want."""
    for parameter in vae.parameters():
        if parameter.dim() >= 4:
            form = torch.channels_last_3d if parameter.dim() == 5 else torch.channels_last
            parameter.data = parameter.data.contiguous(memory_format=form)


def _normalise(x: Tensor, gamma: Tensor) -> Tensor:
    """The RMS norm of Wan over the last axis, in float32."""
    x = x.float()
    return x * (x.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt() * x.shape[-1] ** 0.5) * gamma


def _normalise_silu(x: Tensor, gamma: Tensor) -> Tensor:
    return F.silu(_normalise(x, gamma)).to(x.dtype)


@cache
def _fused_normalise_silu() -> Callable[[Tensor, Tensor], Tensor]:
    """`_normalise_silu` as one kernel, compiled at the first call (which takes a C++ compiler); three times faster."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(_normalise_silu, dynamic=False)


def _conv(conv: Any, x: Tensor) -> Tensor:
    """Causal convolution: the first frame is preceded by zeros."""
    _, right, _, bottom, front, _ = conv._padding
    if front:
        x = torch.cat([x.new_zeros(x.shape[0], x.shape[1], front, *x.shape[3:]), x], 2).contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, (0, bottom, right))


def _frames(x: Tensor) -> Tensor:
    """(B, C, F, H, W) → (B·F, C, H, W), a view."""
    return x.transpose(1, 2).flatten(0, 1)


def _clips(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _average(short: Any, x: Tensor) -> Tensor:
    """The averaging shortcut (AvgDown3D) of the encoder."""
    t, s = short.factor_t, short.factor_s
    if t == s == short.group_size == 1:
        return x
    if short.group_size != s * s:
        return short(x)
    y = _clips(F.avg_pool2d(_frames(x), s), x.shape[0])
    y = F.pad(y, (0, 0, 0, 0, -y.shape[2] % t, 0)).unflatten(2, (-1, t))
    return y.permute(0, 2, 4, 5, 1, 3).flatten(4).permute(0, 4, 1, 2, 3)


def _duplicate(short: Any, x: Tensor) -> Tensor:
    """The duplicating shortcut (DupUp3D) of the decoder, for a clip from its first frame."""
    t, s = short.factor_t, short.factor_s
    if short.repeats == t * s * s:
        x = x if t == 1 else x.repeat_interleave(t, 2)[:, :, t - 1 :]
        return _clips(F.interpolate(_frames(x), scale_factor=s, mode="nearest-exact"), x.shape[0])
    y = x.permute(0, 2, 3, 4, 1).repeat_interleave(short.repeats, -1).unflatten(-1, (short.out_channels, t, s, s))
    return y.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(5, 6).flatten(3, 4).flatten(1, 2)[:, t - 1 :].permute(0, 4, 1, 2, 3)


@dataclass(frozen=True)
class OnePass:
    """The two halves of a residual VAE (Wan 2.2). fused: compile the norms (a C++ compiler is needed)."""

    vae: Any
    fused: bool = False

    def encode(self, x_BCFHW: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W), F = 1 + 4n → posterior mean and log-variance, (B, 2·48, 1 + n, H/16, W/16).

        The same function as `vae.encode(x).latent_dist.parameters`, in one pass.
        """
        encoder, p = self.vae.encoder, self.vae.config.patch_size
        x = x_BCFHW.unflatten(4, (-1, p)).unflatten(3, (-1, p)).permute(0, 2, 3, 5, 1, 6, 4).flatten(4).permute(0, 4, 1, 2, 3)
        x = _conv(encoder.conv_in, x)
        for block in encoder.down_blocks:
            x = self._down(block, x)
        x = self._mid(encoder.mid_block, x)
        return _conv(self.vae.quant_conv, _conv(encoder.conv_out, self._activate(encoder.norm_out, x)))

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Latents (B, 48, 1 + n, H/16, W/16) → pixels (B, 3, 1 + 4n, H, W), not clamped to [-1, 1].

        The same function as `vae.decode(z).sample` but for the clamp, in one pass.
        """
        decoder, p = self.vae.decoder, self.vae.config.patch_size
        x = self._mid(decoder.mid_block, _conv(decoder.conv_in, _conv(self.vae.post_quant_conv, z_BCTHW)))
        for block in decoder.up_blocks:
            x = self._up(block, x)
        x = _conv(decoder.conv_out, self._activate(decoder.norm_out, x))
        x = x.unflatten(1, (-1, p, p)).permute(0, 1, 4, 5, 3, 6, 2)
        return x.flatten(5, 6).flatten(3, 4)

    def _activate(self, norm: Any, x: Tensor) -> Tensor:
        """RMS norm over channels, then SiLU."""
        channels_last = x.movedim(1, -1)
        rows = channels_last.reshape(-1, x.shape[1])
        if self.fused:
            torch._dynamo.mark_dynamic(rows, 0)
        rows = (_fused_normalise_silu() if self.fused else _normalise_silu)(rows, norm.gamma.flatten())
        return rows.view(channels_last.shape).movedim(-1, 1)

    def _resnet(self, block: Any, x: Tensor) -> Tensor:
        h = _conv(block.conv1, self._activate(block.norm1, x))
        h = _conv(block.conv2, self._activate(block.norm2, h))
        return h + (x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x))

    def _mid(self, block: Any, x: Tensor) -> Tensor:
        x = self._resnet(block.resnets[0], x)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            frames = _frames(x)
            tokens = _normalise(frames.flatten(2).transpose(1, 2), attention.norm.gamma.flatten()).to(x.dtype)
            qkv = F.linear(tokens, attention.to_qkv.weight.flatten(1), attention.to_qkv.bias)
            q, k, v = qkv.unsqueeze(1).chunk(3, -1)
            mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
            out = F.linear(mixed, attention.proj.weight.flatten(1), attention.proj.bias)
            x = x + _clips(out.transpose(1, 2).unflatten(2, frames.shape[2:]), x.shape[0])
            x = self._resnet(resnet, x)
        return x

    def _down(self, block: Any, x: Tensor) -> Tensor:
        y = _average(block.avg_shortcut, x)
        for resnet in block.resnets:
            x = self._resnet(resnet, x)
        if block.downsampler is not None:
            x = _clips(block.downsampler.resample(_frames(x)), x.shape[0])
            if block.downsampler.mode == "downsample3d" and x.shape[2] > 1:
                x = torch.cat([x[:, :, :1], _conv(block.downsampler.time_conv, x)], 2)
        return x + y

    def _up(self, block: Any, x: Tensor) -> Tensor:
        short, y = block.avg_shortcut, x
        for resnet in block.resnets:
            x = self._resnet(resnet, x)
        if block.upsampler is None:
            return x
        if block.upsampler.mode == "upsample3d" and x.shape[2] > 1:
            # The first frame stays one frame; the others become two each, without seeing the first.
            rest = _conv(block.upsampler.time_conv, x[:, :, 1:]).unflatten(1, (2, -1))
            x = torch.cat([x[:, :, :1], rest.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
        conv = block.upsampler.resample[1]
        frames = F.interpolate(_frames(x), scale_factor=2, mode="nearest-exact")
        x = _clips(F.conv2d(frames, conv.weight, conv.bias, padding=1), x.shape[0])
        return x + _duplicate(short, y)
