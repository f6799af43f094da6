"""Arithmetic of a training step, and what the device could do at most: their quotient is the model FLOPs utilisation (MFU).

Counted are the multiplications and additions of matrix products that the model needs, forward once and backward twice
(once where only adapters are trained), causal attention by half; not what is computed a second time to save memory.
"""

from __future__ import annotations

import time

import torch

from reelflow.config import FlowConfig

PEAKS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L40": 181e12, "L4": 121e12, "A10G": 70e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 products per second that the makers state, by a part of the device's name."""


def layer(config: FlowConfig, width: int, tokens: float, keys: float) -> float:
    """FLOPs forward of one transformer layer over `tokens` tokens, each of which sees `keys` of them on average."""
    heads = config.num_heads or width // config.head_dim
    inner, kv = heads * config.head_dim, (config.num_kv_heads or heads) * config.head_dim
    products = width * (inner + 2 * kv) + inner * width + width * 4 * width * (3 if config.mlp == "swiglu" else 2)
    return 2 * tokens * (products + 2 * inner * keys)


def flow_forward(config: FlowConfig, frames: int, places: int) -> float:
    """FLOPs of the map x → z for one clip of `frames` latent frames of `places` places each."""
    tokens, text = frames * places, config.text_tokens
    ends = 2 * tokens * 3 * config.channels  # in and out projections, per unit of width
    shallow = sum(config.layers[:-1]) * layer(config, config.width, tokens, places / 2)
    shallow += (len(config.layers) - 1) * ends * config.width
    both = text + tokens
    deep = config.layers[-1] * layer(config, config.deep_width, both, both / 2) + ends * config.deep_width
    return shallow + deep + 2 * text * config.text_dim * config.deep_width


def denoiser_forward(config: FlowConfig, frames: int, places: int) -> float:
    """FLOPs of the learned denoiser for one clip; 0 without one."""
    if config.denoiser is None:
        return 0.0
    width, window = config.denoiser.width, config.denoiser.window
    text = config.text_tokens if config.denoiser.text else 0
    total: float = 2 * places * frames * 2 * config.channels * width + 2 * text * config.text_dim * width
    for index in range(config.denoiser.layers):
        ahead = config.denoiser.look_ahead if index == 0 or config.denoiser.look_ahead_layers == "all" else 1
        pairs = text * (text + min(frames, ahead) * places)
        for frame in range(frames):
            first = 0 if window is None else max(0, frame + ahead - 1 - window)
            pairs += places * (text + (min(frames, frame + ahead) - first) * places)
        tokens = text + frames * places
        total += layer(config, width, tokens, pairs / tokens)
    return total


def foresight_forward(config: FlowConfig, frames: int, places: int) -> float:
    """What `foresight` adds for one clip: the frames from the second on once more, each with those before it."""
    tokens, keys = (frames - 1) * places, config.text_tokens + places * (frames / 2 + 1)
    ends = 2 * tokens * 3 * config.channels * config.deep_width
    return config.layers[-1] * layer(config, config.deep_width, tokens, keys) + ends


def training_step(
    config: FlowConfig, frames: int, places: int, denoiser: bool = True, adapters: bool = False, foresight: bool = False
) -> float:
    """FLOPs of forward and backward for one clip."""
    forward = flow_forward(config, frames, places)
    forward += denoiser_forward(config, frames, places) if denoiser else 0.0
    forward += foresight_forward(config, frames, places) if foresight else 0.0
    return forward * (2 if adapters else 3)


def peak(device: torch.device, precision: str) -> float:
    """Products and sums per second that the device reaches at best: of a known GPU as its maker states them, else measured by
    a short matrix product.
    """
    if device.type == "cuda" and precision == "bfloat16":
        name = torch.cuda.get_device_name(device)
        known = [value for part, value in PEAKS.items() if part in name]
        if known:
            return known[0]
    size = 4096 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=getattr(torch, precision))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 0.1 or best == float("inf"):
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
