"""Stable Video Diffusion as Stability's files name it: every key, and what the networks compute with them, in plain torch.

Written from the structure of generative-models (`VideoUNet`, `VideoDecoder`) and open_clip, and independent of both our
conversion and diffusers' modules: the truth that `adapters.svd_names` is held against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
UNET, DECODER, ENCODER = "model.diffusion_model.", "first_stage_model.decoder.", "conditioner.embedders.3.encoder."
CLIP = "conditioner.embedders.0.open_clip.model.visual."
BOTH = ("weight", "bias")


def both(*names: str) -> Iterator[str]:
    for name in names:
        yield from (f"{name}.{kind}" for kind in BOTH)


def res_block_keys(p: str, skip: bool, embedding: bool = True) -> Iterator[str]:
    yield from both(f"{p}.in_layers.0", f"{p}.in_layers.2", f"{p}.out_layers.0", f"{p}.out_layers.3")
    if embedding:
        yield from both(f"{p}.emb_layers.1")
    if skip:
        yield from both(f"{p}.skip_connection")


def video_block_keys(p: str, skip: bool) -> Iterator[str]:
    yield from res_block_keys(p, skip)
    yield from res_block_keys(f"{p}.time_stack", False)
    yield f"{p}.time_mixer.mix_factor"


def transformer_keys(p: str) -> Iterator[str]:
    yield from both(f"{p}.norm", f"{p}.proj_in", f"{p}.proj_out", f"{p}.time_pos_embed.0", f"{p}.time_pos_embed.2")
    yield f"{p}.time_mixer.mix_factor"
    for block in (f"{p}.transformer_blocks.0", f"{p}.time_stack.0"):
        yield from both(*(f"{block}.norm{i}" for i in (1, 2, 3)), f"{block}.ff.net.0.proj", f"{block}.ff.net.2")
        for attention in (f"{block}.attn1", f"{block}.attn2"):
            yield from (f"{attention}.to_{x}.weight" for x in "qkv")
            yield from both(f"{attention}.to_out.0")
    yield from both(f"{p}.time_stack.0.norm_in", f"{p}.time_stack.0.ff_in.net.0.proj", f"{p}.time_stack.0.ff_in.net.2")


def unet_keys() -> Iterator[str]:
    yield from both("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0", "out.0", "out.2")
    for i in range(1, 12):
        if i % 3 == 0:
            yield from both(f"input_blocks.{i}.0.op")
            continue
        yield from video_block_keys(f"input_blocks.{i}.0", skip=i in (4, 7))
        if i < 9:
            yield from transformer_keys(f"input_blocks.{i}.1")
    yield from video_block_keys("middle_block.0", skip=False)
    yield from transformer_keys("middle_block.1")
    yield from video_block_keys("middle_block.2", skip=False)
    for i in range(12):
        yield from video_block_keys(f"output_blocks.{i}.0", skip=True)
        if i > 2:
            yield from transformer_keys(f"output_blocks.{i}.1")
    yield from both("output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv")


def vae_block_keys(p: str, shortcut: bool, temporal: bool) -> Iterator[str]:
    yield from both(f"{p}.norm1", f"{p}.conv1", f"{p}.norm2", f"{p}.conv2", *([f"{p}.nin_shortcut"] if shortcut else []))
    if temporal:
        yield from res_block_keys(f"{p}.time_stack", skip=False, embedding=False)
        yield f"{p}.mix_factor"


def vae_middle_keys(temporal: bool) -> Iterator[str]:
    yield from both("conv_in", "norm_out", "conv_out", *(f"mid.attn_1.{name}" for name in ("norm", "q", "k", "v", "proj_out")))
    for block in ("mid.block_1", "mid.block_2"):
        yield from vae_block_keys(block, False, temporal)


def encoder_keys() -> Iterator[str]:
    yield from vae_middle_keys(temporal=False)
    for level in range(4):
        for block in range(2):
            yield from vae_block_keys(f"down.{level}.block.{block}", shortcut=block == 0 and level in (1, 2), temporal=False)
        if level < 3:
            yield from both(f"down.{level}.downsample.conv")


def decoder_keys(temporal: bool = True) -> Iterator[str]:
    yield from vae_middle_keys(temporal)
    for level in range(4):
        for block in range(3):
            yield from vae_block_keys(f"up.{level}.block.{block}", shortcut=block == 0 and level in (0, 1), temporal=temporal)
        if level:
            yield from both(f"up.{level}.upsample.conv")
    if temporal:
        yield from both("conv_out.time_mix_conv")


def clip_keys(layers: int = 32) -> Iterator[str]:
    yield from ("class_embedding", "positional_embedding", "proj", "conv1.weight", *both("ln_pre", "ln_post"))
    for i in range(layers):
        p = f"transformer.resblocks.{i}"
        yield from (f"{p}.attn.in_proj_weight", f"{p}.attn.in_proj_bias")
        yield from both(f"{p}.ln_1", f"{p}.ln_2", f"{p}.attn.out_proj", f"{p}.mlp.c_fc", f"{p}.mlp.c_proj")


def linear(s: State, p: str, x: Tensor) -> Tensor:
    return F.linear(x, s[f"{p}.weight"], s.get(f"{p}.bias"))


def norm(s: State, p: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.group_norm(x, 32, s[f"{p}.weight"], s[f"{p}.bias"], eps)


def layer_norm(s: State, p: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{p}.weight"], s[f"{p}.bias"])


def conv(s: State, p: str, x: Tensor, stride: int = 1) -> Tensor:
    weight, bias = s[f"{p}.weight"], s[f"{p}.bias"]
    padding = tuple(side // 2 for side in weight.shape[2:])
    return F.conv3d(x, weight, bias, padding=padding) if weight.ndim == 5 else F.conv2d(x, weight, bias, stride, padding)


def in_time(x: Tensor, frames: int) -> Tensor:
    """(b t) c h w → b c t h w."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


def flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def res_block(s: State, p: str, x: Tensor, embedding: Tensor | None) -> Tensor:
    """`embedding`: (b, c), or (b, t, c) for a block over time."""
    h = conv(s, f"{p}.in_layers.2", F.silu(norm(s, f"{p}.in_layers.0", x)))
    if embedding is not None:
        e = linear(s, f"{p}.emb_layers.1", F.silu(embedding))
        h = h + (e[:, :, None, None] if e.ndim == 2 else e.transpose(1, 2)[..., None, None])
    h = conv(s, f"{p}.out_layers.3", F.silu(norm(s, f"{p}.out_layers.0", h)))
    return h + (conv(s, f"{p}.skip_connection", x) if f"{p}.skip_connection.weight" in s else x)


def video_block(s: State, p: str, x: Tensor, embedding: Tensor, frames: int) -> Tensor:
    spatial = in_time(res_block(s, p, x, embedding), frames)
    temporal = res_block(s, f"{p}.time_stack", spatial, embedding.unflatten(0, (-1, frames)))
    alpha = torch.sigmoid(s[f"{p}.time_mixer.mix_factor"])
    return flat(alpha * spatial + (1 - alpha) * temporal)


def attention(s: State, p: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
    q, k, v = (
        linear(s, f"{p}.to_{name}", y).unflatten(-1, (heads, -1)).transpose(-3, -2)
        for name, y in zip("qkv", (x, context, context), strict=True)
    )
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
    return linear(s, f"{p}.to_out.0", (weights @ v).transpose(-3, -2).flatten(-2))


def feed_forward(s: State, p: str, x: Tensor) -> Tensor:
    value, gate = linear(s, f"{p}.net.0.proj", x).chunk(2, -1)
    return linear(s, f"{p}.net.2", value * F.gelu(gate))


def transformer_block(s: State, p: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
    normed = layer_norm(s, f"{p}.norm1", x)
    x = attention(s, f"{p}.attn1", normed, normed, heads) + x
    x = attention(s, f"{p}.attn2", layer_norm(s, f"{p}.norm2", x), context, heads) + x
    return feed_forward(s, f"{p}.ff", layer_norm(s, f"{p}.norm3", x)) + x


def sinusoids(t: Tensor, dim: int) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


def transformer(s: State, p: str, x: Tensor, context: Tensor, frames: int) -> Tensor:
    """`context`: (b t, 1, e)."""
    channels, height, width = x.shape[1:]
    heads = max(1, channels // 64)
    y = linear(s, f"{p}.proj_in", norm(s, f"{p}.norm", x, 1e-6).flatten(2).transpose(1, 2))
    y = transformer_block(s, f"{p}.transformer_blocks.0", y, context, heads)
    places = sinusoids(torch.arange(frames), channels).to(x)
    places = linear(s, f"{p}.time_pos_embed.2", F.silu(linear(s, f"{p}.time_pos_embed.0", places)))
    z = (y.unflatten(0, (-1, frames)) + places[:, None]).transpose(1, 2).flatten(0, 1)  # (b s) t c
    first = context.unflatten(0, (-1, frames))[:, 0].repeat_interleave(height * width, 0)
    block = f"{p}.time_stack.0"
    z = feed_forward(s, f"{block}.ff_in", layer_norm(s, f"{block}.norm_in", z)) + z
    z = transformer_block(s, block, z, first, heads)
    z = z.unflatten(0, (-1, height * width)).transpose(1, 2).flatten(0, 1)
    alpha = torch.sigmoid(s[f"{p}.time_mixer.mix_factor"])
    y = linear(s, f"{p}.proj_out", alpha * y + (1 - alpha) * z)
    return y.transpose(1, 2).unflatten(2, (height, width)) + x


def unet(s: State, x: Tensor, t: Tensor, context: Tensor, ids: Tensor, frames: int) -> Tensor:
    """x (b t, 8, h, w), t (b t,), context (b t, 1, e), ids (b t, 3) → (b t, 4, h, w)."""
    width, told = s["time_embed.0.weight"].shape[1], s["label_emb.0.0.weight"].shape[1] // 3
    embedding = linear(s, "time_embed.2", F.silu(linear(s, "time_embed.0", sinusoids(t, width).to(x))))
    ids = torch.cat([sinusoids(ids[:, i], told) for i in range(3)], -1).to(x)
    embedding = embedding + linear(s, "label_emb.0.2", F.silu(linear(s, "label_emb.0.0", ids)))

    def level(p: str, x: Tensor) -> Tensor:
        for j in range(3):
            q = f"{p}.{j}"
            if f"{q}.in_layers.0.weight" in s:
                x = video_block(s, q, x, embedding, frames)
            elif f"{q}.proj_in.weight" in s:
                x = transformer(s, q, x, context, frames)
            elif f"{q}.op.weight" in s:
                x = conv(s, f"{q}.op", x, stride=2)
            elif f"{q}.conv.weight" in s:
                x = conv(s, f"{q}.conv", F.interpolate(x, scale_factor=2, mode="nearest"))
        return x

    x = conv(s, "input_blocks.0.0", x)
    skips = [x]
    for i in range(1, 12):
        x = level(f"input_blocks.{i}", x)
        skips.append(x)
    x = level("middle_block", x)
    for i in range(12):
        x = level(f"output_blocks.{i}", torch.cat((x, skips.pop()), 1))
    return conv(s, "out.2", F.silu(norm(s, "out.0", x)))


def vae_block(s: State, p: str, x: Tensor, frames: int) -> Tensor:
    h = conv(s, f"{p}.conv1", F.silu(norm(s, f"{p}.norm1", x, 1e-6)))
    h = conv(s, f"{p}.conv2", F.silu(norm(s, f"{p}.norm2", h, 1e-6)))
    x = (conv(s, f"{p}.nin_shortcut", x) if f"{p}.nin_shortcut.weight" in s else x) + h
    if f"{p}.mix_factor" not in s:
        return x
    spatial = in_time(x, frames)
    alpha = torch.sigmoid(s[f"{p}.mix_factor"])
    return flat(alpha * res_block(s, f"{p}.time_stack", spatial, None) + (1 - alpha) * spatial)


def vae_attention(s: State, p: str, x: Tensor) -> Tensor:
    h = norm(s, f"{p}.norm", x, 1e-6)
    q, k, v = (conv(s, f"{p}.{name}", h).flatten(2).transpose(1, 2) for name in "qkv")
    h = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1) @ v
    return x + conv(s, f"{p}.proj_out", h.transpose(1, 2).unflatten(2, x.shape[2:]))


def middle(s: State, x: Tensor, frames: int) -> Tensor:
    return vae_block(s, "mid.block_2", vae_attention(s, "mid.attn_1", vae_block(s, "mid.block_1", x, frames)), frames)


def encode(s: State, x: Tensor) -> Tensor:
    x = conv(s, "conv_in", x)
    for level in range(4):
        for block in range(2):
            x = vae_block(s, f"down.{level}.block.{block}", x, 1)
        if level < 3:
            x = F.conv2d(F.pad(x, (0, 1, 0, 1)), s[f"down.{level}.downsample.conv.weight"], s[f"down.{level}.downsample.conv.bias"], 2)
    return conv(s, "conv_out", F.silu(norm(s, "norm_out", middle(s, x, 1), 1e-6)))


def decode(s: State, z: Tensor, frames: int) -> Tensor:
    x = middle(s, conv(s, "conv_in", z), frames)
    for level in (3, 2, 1, 0):
        for block in range(3):
            x = vae_block(s, f"up.{level}.block.{block}", x, frames)
        if level:
            x = conv(s, f"up.{level}.upsample.conv", F.interpolate(x, scale_factor=2, mode="nearest"))
    x = conv(s, "conv_out", F.silu(norm(s, "norm_out", x, 1e-6)))
    return flat(conv(s, "conv_out.time_mix_conv", in_time(x, frames))) if "conv_out.time_mix_conv.weight" in s else x


def clip(s: State, x: Tensor, heads: int) -> Tensor:
    x = F.conv2d(x, s["conv1.weight"], stride=s["conv1.weight"].shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat((s["class_embedding"].expand(len(x), 1, -1), x), 1) + s["positional_embedding"]
    x = layer_norm(s, "ln_pre", x)
    for i in range(sum(key.endswith("ln_1.weight") for key in s)):
        p = f"transformer.resblocks.{i}"
        y = layer_norm(s, f"{p}.ln_1", x).transpose(0, 1)
        weights = (s[f"{p}.attn.{name}"] for name in ("in_proj_weight", "in_proj_bias"))
        y, _ = F.multi_head_attention_forward(
            y, y, y, x.shape[-1], heads, *weights, None, None, False, 0.0, s[f"{p}.attn.out_proj.weight"], s[f"{p}.attn.out_proj.bias"]
        )
        x = x + y.transpose(0, 1)
        x = x + linear(s, f"{p}.mlp.c_proj", F.gelu(linear(s, f"{p}.mlp.c_fc", layer_norm(s, f"{p}.ln_2", x))))
    return layer_norm(s, "ln_post", x[:, 0]) @ s["proj"]
