"""What a clip needs of memory, counted before anything is loaded.

Weights are counted from the configuration; caches, and what the networks work on, by `trial`. Not counted: what an allocator loses
between tensors, and the workspaces of libraries; `RESERVE` is for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from reelflow.adapters.precision import QUANTISED, compute_dtype, quantised, weight_bytes
from reelflow.adapters.vae import Codec
from reelflow.config import FlowConfig
from reelflow.flow import StarFlow
from reelflow.pipelines.offload import CACHES, DEEP_LAYERS
from reelflow.pipelines.trial import Trial, Wish

RESERVE = {"cpu": 700_000_000, "cuda": 1_000_000_000}
"""Bytes: a process on a CPU before it loads a model; a GPU's context and its libraries' workspaces (assumed, not measured)."""


@dataclass(frozen=True)
class Way:
    """A way of running a model.

    precision: of the flow's layers.  layers: the deep block's are on the "device", or in the "host"'s memory until they are needed.
    cache: the deep block's is "whole", in "bytes", or in the "host"'s memory.  turns: parts are on the device only while they are used.
    codec: its precision.
    """

    precision: str
    layers: str = "device"
    cache: str = "whole"
    turns: bool = False
    codec: str = "float32"

    def __str__(self) -> str:
        parts = [f"{self.precision}" + " (approximate)" * (self.precision in QUANTISED)]
        parts += ["cache in 8 bits (approximate)"] * (self.cache == "bytes")
        away = " and ".join(["layers"] * (self.layers == "host") + ["cache"] * (self.cache == "host"))
        parts += [f"{away} in the host's memory"] * bool(away)
        parts += ["each part on the device only while it is used"] * self.turns + ["codec in bfloat16"] * (self.codec == "bfloat16")
        return ", ".join(parts)


class Account:
    """Bytes of a model's parts.

    Args:
        codec, text: the VAE's codec and the T5 encoder, on `meta`; text is None for a model without.
        device: the type of device, "cpu" or "cuda".
    """

    def __init__(self, config: FlowConfig, codec: Codec, text: Any | None, device: str):
        self.config, self.codec, self.text, self.device = config, codec, text, device
        self.trial = Trial(config, codec, text, device)

    def clip(self, wish: Wish) -> str:
        """A clip in words."""
        frames, unit = 1 + (wish.frames - 1) * self.codec.temporal_factor, self.codec.spatial_factor
        several = f"{wish.clips} clips of " if wish.clips > 1 else ""
        return f"{several}{frames} frames of {wish.width * unit} × {wish.height * unit}{' with guidance' if wish.guidance else ''}"

    def need(self, way: Way, wish: Wish) -> int:
        """The most that is on the device at any time."""
        return max(self.stages(way, wish).values())

    def stages(self, way: Way, wish: Wish) -> dict[str, int]:
        """What is on the device in each stage: the reserve, the weights that are there then, caches, and what is worked on."""
        held, reserve = self.weights(way), RESERVE.get(self.device, RESERVE["cuda"])
        return {
            stage: reserve + work + sum(size for part, size in held.items() if part in parts or not way.turns)
            for stage, parts, work in self._stages(way, wish)
        }

    def _stages(self, way: Way, wish: Wish) -> Iterator[tuple[str, tuple[str, ...], int]]:
        """(stage, the parts it uses, bytes besides their weights)."""
        dtype, codec, work = compute_dtype(way.precision), getattr(torch, way.codec), self.trial.work
        wide = max(weight_sizes(self.config, "bfloat16", self.device).values()) if way.precision in QUANTISED else 0  # one while it is used
        if self.text is not None:
            yield "text", ("text",), work("text", dtype, wish)
        if wish.given or wish.read:
            yield "encode", ("codec",), work("encode", codec, wish)
        if wish.read:
            yield "read", ("flow",), wide + work("read", dtype, wish)
            return
        deep = self.cache(way, wish)[0] + work("deep", dtype, wish)
        shallow = work("shallow", dtype, wish)
        score = work("denoise", dtype, wish) if wish.denoise else 0
        pixels = work("decode", codec, wish)
        if wish.stream:
            yield "stream", ("flow", "denoiser", "codec"), wide + deep + shallow + score + pixels
            return
        yield "sample", ("flow",), wide + max(deep, shallow)
        if wish.denoise:
            yield "denoise", ("denoiser" if self.config.denoiser else "flow",), wide + score
        yield "decode", ("codec",), pixels

    def weights(self, way: Way) -> dict[str, int]:
        """Bytes of each part's weights on the device while it is used: flow, denoiser, codec, text."""
        sizes = weight_sizes(self.config, way.precision, self.device)
        denoiser = sum(size for name, size in sizes.items() if name.startswith("denoiser."))
        far = self.far(way)
        return {
            "flow": sum(sizes.values()) - denoiser - sum(far) + 2 * max(far, default=0),  # one at work, the next on its way
            "denoiser": denoiser,
            "codec": sum(p.numel() for p in self.codec.vae.parameters()) * getattr(torch, way.codec).itemsize,
            "text": sum(p.nbytes for p in self.text.parameters()) if self.text is not None else 0,
        }

    def far(self, way: Way) -> list[int]:
        """Bytes of each tensor of layers that are in the host's memory."""
        sizes = weight_sizes(self.config, way.precision, self.device)
        return [size for name, size in sizes.items() if way.layers == "host" and name.startswith(DEEP_LAYERS)]

    def cache(self, way: Way, wish: Wish) -> tuple[int, list[int]]:
        """The deep block's keys and values: bytes on the device, what is worked on included; of each tensor in the host's memory."""
        dtype = compute_dtype(way.precision)
        _, rows, slots, heads, head_dim = self.trial.cache(dtype, wish)
        with self.trial.fake:
            cache = CACHES[way.cache](self.config.layers[-1], rows, heads, slots, head_dim, dtype, torch.device("cpu"))
            far = [cache.keys.nbytes, cache.values.nbytes] if way.cache == "host" else []
            near = sum(x.nbytes for x in vars(cache).values() if isinstance(x, Tensor)) - sum(far)
            near += cache.keys[:, :, : self.config.text_tokens + 1].nbytes if wish.ring else 0  # as they were before they turned along
        twice = 2 if wish.stream and not wish.ring and wish.frames > self.trial.window(wish) else 1  # the next window is read meanwhile
        return twice * near, twice * far

    def moved(self, way: Way, wish: Wish) -> int:
        """What comes from the host's memory in a pass at the end of the clip, at most."""
        return sum(self.far(way)) + sum(self.cache(way, wish)[1])

    def host(self, way: Way, wish: Wish) -> int:
        """What the host's memory has to hold of a model on another device."""
        kept = self.far(way) + self.cache(way, wish)[1]
        kept = [1 << (size - 1).bit_length() for size in kept] if self.device == "cuda" else kept  # PyTorch pins powers of two
        return RESERVE["cpu"] + sum(kept) + (sum(self.weights(way).values()) if way.turns else 0)


@lru_cache(maxsize=8)
def weight_sizes(config: FlowConfig, precision: str, device: str) -> dict[str, int]:
    """Bytes of the flow's tensors, by name."""
    with torch.device("meta"):
        flow = StarFlow(config).set_precision(compute_dtype(precision))
    found = {}
    for name, p in flow.named_parameters():
        module, _, kind = name.rpartition(".")
        matrix = kind == "weight" and p.ndim == 2 and quantised(module)
        found[name] = weight_bytes(precision, p.shape[0], p.shape[1], device) if matrix else p.nbytes
    return found


__all__ = ["Account", "Way", "Wish", "weight_sizes"]
