"""Wan's causal video VAE over the weights of diffusers' `AutoencoderKLWan`: the same function, organised for speed.

Frames lie channels-last throughout, so that a causal convolution reads them where they are, a 1×1 convolution is a matrix product
and the norm runs along memory. A stream takes the frames as they come and writes into buffers that it keeps; the same passes without
buffers take a whole clip at once and are differentiable.

Legend: B clips, T frames (of whatever rate the layer has), H × W places, C channels; shapes are (B, T, H, W, C) unless a name says else.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAST = 2
"""Frames before a frame that a causal convolution over time reads."""
IM2COL = 20480
"""C·T·H up to which PyTorch takes a single float32 clip to a plain loop instead of oneDNN, 5 to 20 times slower (CPU, `use_mkldnn`)."""
PAIRED = 64
"""Channels from which convolving in pairs of frames is faster (CPU, float32: 1.1 times at 64, 1.3 to 1.7 times at 128 and 256)."""


def channels_last(vae: nn.Module) -> None:
    """Lay the convolution weights out channels-last, in place: what the kernels below read without a copy."""
    for parameter in vae.parameters():
        if parameter.dim() >= 4:
            form = torch.channels_last_3d if parameter.dim() == 5 else torch.channels_last
            parameter.data = parameter.data.contiguous(memory_format=form)


def _normalise(x: Tensor, gamma: Tensor, out: Tensor | None = None) -> Tensor:
    """Wan's RMS norm over the last axis."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
    return torch.mul(torch.div(x, length, out=out), gamma * x.shape[-1] ** 0.5, out=out)


def activate(x: Tensor, gamma: Tensor, out: Tensor | None = None) -> Tensor:
    """Wan's RMS norm over the last axis, then SiLU; into `out` where given, which no gradient passes."""
    return F.silu(_normalise(x, gamma, out), inplace=out is not None)


def _pointwise(conv: Any, x: Tensor) -> Tensor:
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def _taps_in_channels(weight: Tensor) -> Tensor:
    """(O, C, taps, y, x) → (O, taps·C, y, x): the kernel over frames that lie behind each other in the channels."""
    return weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)


def _pairs(weight: Tensor) -> list[Tensor]:
    """Kernels (O, C, 3, 3) of the four sums of frames that two frames of a causal convolution are made of: Winograd's F(2, 3)."""
    a, b, c = weight.unbind(2)
    kernels = (a, (a + b + c) / 2, (a - b + c) / 2, c)
    return [kernel.contiguous(memory_format=torch.channels_last) for kernel in kernels]


def _phases(weight: Tensor) -> Tensor:
    """Kernels (4·O, C, 2, 2) that give the four pixels of a place of the small grid, for a 3×3 kernel behind nearest ×2.

    Of the three rows under the kernel two are copies of one, so their weights add up: 16 products instead of 36.
    """
    fold = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
    kernels = torch.einsum("ocyx,apy,bqx->abocpq", weight, fold, fold).flatten(0, 2)
    return kernels.contiguous(memory_format=torch.channels_last)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every frame by itself."""
    y = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, padding=1)
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


class WanPass:
    """The way of some clips through the VAE, from their first frame on.

    Args:
        vae: an `AutoencoderKLWan`, best laid out by `channels_last`. Wan 2.2 (residual) or 2.1.
        stream: keep what the next frames need, so that `encode` and `decode` go on where they stopped; without gradients.
            Memory holds the past of every convolution and the activations of the frames at hand. From the second call with latents of
            one shape on, shapes and buffers stay. False: every call is a whole clip, and differentiable.
        activate: norm and SiLU where nothing is kept, `activate` or a faster one.
    """

    def __init__(self, vae: Any, stream: bool, activate: Callable[[Tensor, Tensor], Tensor] = activate):
        self.vae, self.stream, self.activate = vae, stream, activate
        self._past: dict[Any, Tensor] = {}
        self._kernels: dict[Any, Any] = {}
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    def encode(self, x_BCTHW: Tensor) -> Tensor:
        """Pixels (B, 3, 1 + 4n, H, W), in a stream also the next 4n → posterior mean and log-variance (B, 2·C, 1 + n or n, h, w)."""
        encoder, p = self.vae.encoder, self.vae.config.patch_size or 1
        x = x_BCTHW.unflatten(4, (-1, p)).unflatten(3, (-1, p)).permute(0, 2, 3, 5, 1, 6, 4).flatten(4)
        first = encoder.conv_in not in self._past
        x = self._causal(encoder.conv_in, x)
        for block in encoder.down_blocks:
            x = self._down(block, x, first)
        x = self._causal(encoder.conv_out, self._mid(encoder.mid_block, x), encoder.norm_out)
        return _pointwise(self.vae.quant_conv, x).permute(0, 4, 1, 2, 3)

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Latents (B, C, T, h, w) → pixels (B, 3, 1 + 4·(T − 1), H, W), in a stream then 4·T; not clamped to [-1, 1]."""
        decoder, p = self.vae.decoder, self.vae.config.patch_size or 1
        first = decoder.conv_in not in self._past
        x = self._causal(decoder.conv_in, _pointwise(self.vae.post_quant_conv, z_BCTHW.permute(0, 2, 3, 4, 1)))
        x = self._mid(decoder.mid_block, x)
        for block in decoder.up_blocks:
            x = self._up(block, x, first)
        x = self._causal(decoder.conv_out, x, decoder.norm_out)
        return x.unflatten(-1, (-1, p, p)).permute(0, 1, 2, 6, 3, 5, 4).flatten(4, 5).flatten(2, 3).permute(0, 4, 1, 2, 3)

    def _causal(self, conv: Any, x: Tensor, norm: Any = None, past: int = PAST) -> Tensor:
        """Causal convolution, behind `norm` and SiLU where given; before the first frame are zeros."""
        gamma = None if norm is None else norm.gamma.flatten()
        if not self.stream:
            x = x if gamma is None else self.activate(x, gamma)
            return self._convolve(conv, F.pad(x, (0, 0, 0, 0, 0, 0, past, 0)))
        window = self._scratch(x, 0, past + x.shape[1])
        new = window[:, past:]
        if gamma is None:
            new.copy_(x)
        else:
            activate(x, gamma, out=new)
        del x, new  # the caller may have nothing else that holds it
        window[:, :past] = self._past.get(conv, 0)
        self._keep(conv, window[:, -past:])
        return self._convolve(conv, window)

    def _keep(self, conv: Any, frames: Tensor) -> None:
        """For the next call."""
        if conv in self._past:
            self._past[conv].copy_(frames)
        else:
            self._past[conv] = frames.clone()

    def _convolve(self, conv: Any, x: Tensor) -> Tensor:
        """The convolution over all three axes, padded in space only, by the fastest of the ways to the same numbers.

        For a few large frames the gradient of oneDNN's bfloat16 conv3d (torch 2.13) is wrong, and writes beyond its memory.
        """
        depth, *size = conv.kernel_size
        folded = x.unfold(1, depth, conv.stride[0]).transpose(4, 5)  # (B, T, H, W, taps, C), a view
        if size == [1, 1]:
            return F.linear(folded.flatten(4), self._prepared(conv, _taps_in_channels).flatten(1), conv.bias)
        unsafe = not self.stream and x.is_cpu and folded.shape[1] < 8 and x.shape[2:4].numel() > 32**2
        if unsafe or (x.dtype == torch.float32 and len(x) == 1 and x.shape[1:3].numel() * x.shape[4] <= IM2COL):
            return _conv2d(folded.flatten(4), self._prepared(conv, _taps_in_channels), conv.bias)
        if x.dtype == torch.float32 and self.stream and folded.shape[1] % 2 == 0 and x.shape[4] >= PAIRED:
            return self._convolve_pairs(conv, x)
        return F.conv3d(x.permute(0, 4, 1, 2, 3), conv.weight, conv.bias, padding=(0, 1, 1)).permute(0, 2, 3, 4, 1)

    def _convolve_pairs(self, conv: Any, x: Tensor) -> Tensor:
        """In four convolutions of frames for every two, instead of six."""
        kernels, frames = self._prepared(conv, _pairs), x.shape[1] - PAST
        a, b, c, d = (x[:, i : frames + i : 2] for i in range(4))
        mixed = self._scratch(a, 1, frames // 2)
        u, v = _conv2d(torch.add(b, c, out=mixed), kernels[1], None), _conv2d(torch.sub(c, b, out=mixed), kernels[2], None)
        y = u.new_empty(len(x), frames, *u.shape[2:])
        torch.add(u, v, out=y[:, ::2]).add_(_conv2d(torch.sub(a, c, out=mixed), kernels[0], conv.bias))
        torch.sub(u, v, out=y[:, 1::2]).sub_(_conv2d(torch.sub(b, d, out=mixed), kernels[3], -conv.bias))
        return y

    def _prepared(self, conv: Any, prepare: Callable[[Tensor], Any]) -> Any:
        """The weights of `conv` in another form, made once in a stream."""
        if not self.stream:
            return prepare(conv.weight)
        if (conv, prepare) not in self._kernels:
            self._kernels[conv, prepare] = prepare(conv.weight)
        return self._kernels[conv, prepare]

    def _scratch(self, x: Tensor, index: int, frames: int) -> Tensor:
        """Buffer `index` in the shape of `x` with so many frames; what was in it is lost."""
        shape = (len(x), frames, *x.shape[2:])
        size = torch.Size(shape).numel()
        held = self._buffers.get((index, x.dtype))
        if held is None or held.numel() < size:
            held = self._buffers[index, x.dtype] = x.new_empty(size)
        return held[:size].view(shape)

    def _sum(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, in place of x in a stream."""
        return torch.add(x, y, out=x if self.stream else None)

    def _resnet(self, block: Any, x: Tensor) -> Tensor:
        h = self._causal(block.conv2, self._causal(block.conv1, x, block.norm1), block.norm2)
        return self._sum(h, x if isinstance(block.conv_shortcut, nn.Identity) else _pointwise(block.conv_shortcut, x))

    def _attend(self, block: Any, x: Tensor) -> Tensor:
        """Every place of a frame looks at all of them, with one head."""
        q, k, v = _pointwise(block.to_qkv, _normalise(x, block.norm.gamma.flatten()).flatten(0, 1).flatten(1, 2)).unsqueeze(1).chunk(3, -1)
        mixed = _pointwise(block.proj, F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return self._sum(mixed.view(x.shape), x)

    def _mid(self, block: Any, x: Tensor) -> Tensor:
        x = self._resnet(block.resnets[0], x)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._resnet(resnet, self._attend(attention, x))
        return x

    def _down(self, block: Any, x: Tensor, first: bool) -> Tensor:
        """A stage of the encoder; in Wan 2.1 its parts follow each other without one."""
        if hasattr(block, "conv1"):
            return self._resnet(block, x)
        if hasattr(block, "resample"):
            return self._downsample(block, x, first)
        y = x
        for resnet in block.resnets:
            x = self._resnet(resnet, x)
        if block.downsampler is not None:
            x = self._downsample(block.downsampler, x, first)
        return self._sum(x, _average(block.avg_shortcut, y))

    def _downsample(self, resample: Any, x: Tensor, first: bool) -> Tensor:
        frames = resample.resample(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = frames.unflatten(0, (len(x), -1))
        if resample.mode != "downsample3d":
            return x
        # The first frame stays, and is the past of those that follow.
        conv = resample.time_conv
        if not first:
            x = torch.cat([self._past[conv], x], 1)
        y = self._convolve(conv, x) if x.shape[1] > 1 else x[:, :0]
        if self.stream:
            self._keep(conv, x[:, -1:])
        return torch.cat([x[:, :1], y], 1) if first else y

    def _up(self, block: Any, x: Tensor, first: bool) -> Tensor:
        """A stage of the decoder, Wan 2.2's with a shortcut around it."""
        short, y = getattr(block, "avg_shortcut", None), x
        for resnet in block.resnets:
            x = self._resnet(resnet, x)
        resample = block.upsampler if hasattr(block, "upsampler") else (block.upsamplers or [None])[0]
        if resample is None:
            return x
        if resample.mode == "upsample3d":
            # The first frame stays one frame; the others become two each, without seeing the first.
            kept, rest = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
            if rest.shape[1]:
                rest = self._causal(resample.time_conv, rest).unflatten(-1, (2, -1)).movedim(-2, 2).flatten(1, 2)
            x = torch.cat([kept, rest], 1) if first else rest
        return self._upsample(resample.resample[1], x, short, y, first)

    def _upsample(self, conv: Any, x: Tensor, short: Any, y: Tensor, first: bool) -> Tensor:
        """The convolution behind nearest ×2, plus what the shortcut makes of `y`."""
        kernels, (height, width) = self._prepared(conv, _phases), x.shape[2:4]
        small = _conv2d(x, kernels, conv.bias.repeat(4)).unflatten(-1, (2, 2, -1))  # one row and column more than x
        large = small.new_empty(*x.shape[:2], 2 * height, 2 * width, small.shape[-1])
        frames = 1 if short is None else short.factor_t
        for t, a, b in product(range(frames), range(2), range(2)):
            # Of a clip's first frame only the last of its copies is there.
            start, source = (t, y) if not first else ((t + 1) % frames, y if t == frames - 1 else y[:, 1:])
            target, value = large[:, start::frames, a::2, b::2], small[:, start::frames, a : a + height, b : b + width, a, b]
            if short is None:
                target.copy_(value)
            elif self.stream:
                torch.add(value, source[..., _duplicated(short, 4 * t + 2 * a + b)], out=target)
            else:
                target.copy_(value + source[..., _duplicated(short, 4 * t + 2 * a + b)])
        return large


def _duplicated(short: Any, pixel: int) -> slice | list[int]:
    """The channels that DupUp3D puts into this pixel (frame, row, column) of the place that a pixel becomes."""
    if short.factor % short.repeats == 0:
        return slice(pixel // short.repeats, None, short.factor // short.repeats)
    return [(channel * short.factor + pixel) // short.repeats for channel in range(short.out_channels)]


def _average(short: Any, x: Tensor) -> Tensor:
    """AvgDown3D: a channel becomes one or several, each the mean of an equal share of the frames, rows and columns that become one."""
    t, s, share = short.factor_t, short.factor_s, short.group_size
    if short.factor == share == 1:
        return x
    if short.factor % share:
        return short(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    x = F.pad(x, (0, 0, 0, 0, 0, 0, -x.shape[1] % t, 0))
    pixels = [x[:, i::t, a::s, b::s] for i, a, b in product(range(t), range(s), range(s))]
    means = [sum(pixels[start + 1 : start + share], pixels[start]) / share for start in range(0, short.factor, share)]
    return torch.stack(means, -1).flatten(-2) if len(means) > 1 else means[0]
