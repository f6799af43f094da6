"""A model that is larger than its device: caches in 8 bits or in the host's memory, layers that come as they are needed, and
parts that are on the device only while they are used.

Shapes: B batch rows, H key heads, n tokens of a pass, K slots, D channels of a head.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelflow.flow import KVCache
from reelflow.flow.attention import Attend
from reelflow.flow.block import FlowBlock

DEEP_LAYERS = "deep_block.layers."
"""What the names of the deep block's layers begin with."""


def host_memory() -> int | None:
    """Bytes of this machine, or of the control group that limits this process; None where the system does not say."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such group, or "max"
            total = min(total, int(Path(name).read_text(encoding="ascii")))
    return total


class ByteCache(KVCache):
    """Keys and values in 8 bits, an approximation: every head of every token has a scale of its own, so that no token's depend on
    others of its pass. Half the size, and a fifth of the error of 8-bit floating point (mini, `benchmarks/budget.py --errors`).
    """

    def __init__(self, layers: int, rows: int, heads: int, slots: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        super().__init__(layers, rows, heads, slots, head_dim, torch.int8, device)
        self.dtype = dtype
        self.scales = torch.zeros(2, layers, rows, slots, heads, 1, dtype=dtype, device=device)
        self.near = torch.empty(2, rows, slots, heads, head_dim, dtype=dtype, device=device)
        """Keys and values of the layer at work."""

    def write(self, layer: int, index: Tensor, new: tuple[Tensor, Tensor], used: int) -> tuple[Tensor, Tensor]:
        both = self.keys[layer], self.values[layer]
        for near, store, scales, new_BHnD in zip(self.near, both, self.scales[:, layer], new, strict=True):
            rows = new_BHnD.transpose(1, 2).flatten(0, 1)
            scale = (rows.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(scales.dtype).tiny).to(scales.dtype)
            store.flatten(0, 1).index_copy_(0, index, (rows.float() / scale.float()).round().clamp(-127, 127).to(torch.int8))
            scales.flatten(0, 1).index_copy_(0, index, scale)
            torch.mul(store[:, :used], scales[:, :used], out=near[:, :used])
        return self.near[0][:, :used].transpose(1, 2), self.near[1][:, :used].transpose(1, 2)


class HostCache(KVCache):
    """Keys and values in the host's memory, exact: one layer's are on the device at a time, and the next layer's on their way there."""

    def __init__(self, layers: int, rows: int, heads: int, slots: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        cuda, shape, self.dtype = device.type == "cuda", (layers, rows, slots, heads, head_dim), dtype
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=cuda) for _ in range(2))
        self.near = torch.zeros(2, 2, rows, slots, heads, head_dim, dtype=dtype, device=device)
        """Of an even and of an odd layer: keys, values."""
        self.first_B1 = torch.arange(0, rows * slots, slots, device=device)[:, None]
        self.side = torch.cuda.Stream(device) if cuda else None

    def at(self, slot_Bn: Tensor, seen_BnK: Tensor) -> list[Attend]:
        self.used = seen_BnK.shape[-1]
        self.span = slice(int(slot_Bn.min()), int(slot_Bn.max()) + 1)  # the host has to know where to
        self._fetch(0)
        return super().at(slot_Bn, seen_BnK)

    def write(self, layer: int, index: Tensor, new: tuple[Tensor, Tensor], used: int) -> tuple[Tensor, Tensor]:
        if self.side is not None:
            torch.cuda.current_stream(self.near.device).wait_stream(self.side)
        if layer + 1 < len(self.keys):
            self._fetch(layer + 1)
        near, span = self.near[layer % 2], self.span
        for store_BKHD, far, new_BHnD in zip(near, (self.keys[layer], self.values[layer]), new, strict=True):
            store_BKHD.flatten(0, 1).index_copy_(0, index, new_BHnD.transpose(1, 2).flatten(0, 1).to(store_BKHD.dtype))
            for row, kept in zip(store_BKHD, far, strict=True):  # row by row, for only what lies together is copied as it is
                kept[span].copy_(row[span], non_blocking=True)
        return near[0][:, :used].transpose(1, 2), near[1][:, :used].transpose(1, 2)

    def _fetch(self, layer: int) -> None:
        """Send for a layer's keys and values, once nothing reads what they replace."""
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(self.near.device))
        with torch.cuda.stream(self.side) if self.side is not None else nullcontext():
            for near, far in zip(self.near[layer % 2], (self.keys[layer], self.values[layer]), strict=True):
                for row, kept in zip(near, far, strict=True):
                    row[: self.used].copy_(kept[: self.used], non_blocking=True)


CACHES: dict[str, type[KVCache]] = {"whole": KVCache, "bytes": ByteCache, "host": HostCache}


class Stack(nn.Module):
    """A block's layers, run by one `forward`, as diffusers' group offloading expects them."""

    def __init__(self, layers: nn.ModuleList):
        super().__init__()
        self.layers = layers

    def forward(self, hidden_BTM: Tensor, rotary: Any, attends: list[Attend]) -> Tensor:
        for layer, attend in zip(self.layers, attends, strict=True):
            hidden_BTM = layer(hidden_BTM, rotary, attend)
        return hidden_BTM


def stream_layers(block: FlowBlock, device: torch.device) -> None:
    """Keep the layers of a block in the host's memory: every matrix comes to the device while the one before it is at work.

    Raises:
        ValueError: accelerate, which diffusers does this with, is missing.
    """
    from diffusers.hooks import apply_group_offloading
    from diffusers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise ValueError("layers in the host's memory need accelerate; install it with: pip install 'reelflow[quantize]'")
    stack, cuda = Stack(block.layers), device.type == "cuda"
    for weight in stack.parameters() if cuda else ():  # one by one, for diffusers would have all of them twice meanwhile
        weight.data = weight.data.pin_memory()
    apply_group_offloading(stack, device, torch.device("cpu"), "leaf_level", use_stream=cuda)
    object.__setattr__(block, "run", stack)  # not as a module of the block, whose weights keep their names
    block.recorded = False


class Parts:
    """A model's parts, each on the device only while it is used.

    Args:
        parts: name → a module, and what the names of those of its tensors begin with that are no part of it.
    """

    def __init__(self, device: torch.device, parts: dict[str, tuple[nn.Module, tuple[str, ...]]]):
        self.device, self.parts = device, parts
        for module, _ in parts.values():
            module.to("cpu")

    @contextmanager
    def use(self, *names: str) -> Iterator[None]:
        """Have these parts on the device."""
        homes = [(module, _tensors(module, but)) for module, but in (self.parts[name] for name in names if name in self.parts)]
        try:
            for module, home in homes:
                near = {key: x.to(self.device) for key, x in {id(x): x for x in home.values()}.items()}  # what is shared, once
                _assign(module, {name: near[id(x)] for name, x in home.items()})
                del near
            yield
        finally:
            for module, home in homes:  # nothing is copied back
                _assign(module, home)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def _assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name in module.load_state_dict(tensors, strict=False, assign=True).unexpected_keys:  # buffers that no file holds
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._buffers[leaf] = tensors[name]


def _tensors(module: nn.Module, but: tuple[str, ...]) -> dict[str, Tensor]:
    both = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: x for name, x in both if not name.startswith(but)}


__all__ = ["CACHES", "DEEP_LAYERS", "ByteCache", "HostCache", "Parts", "host_memory", "stream_layers"]
