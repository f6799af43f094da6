"""A memory budget: the best way of running a model that keeps within it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from reelflow.adapters.precision import QUANTISED, quantiser, settle
from reelflow.adapters.text import TextEncoder
from reelflow.adapters.vae import Codec
from reelflow.flow import KVCache, StarFlow
from reelflow.pipelines.account import Account, Way, Wish
from reelflow.pipelines.offload import ByteCache, HostCache, Parts, stream_layers

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse(text: str) -> int:
    """Bytes of "24GB", "23.5 GiB", "800MB".

    Raises:
        ValueError: no number above 0 with a unit.

    Example:
        >>> parse("24GB")
        24000000000
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]+)", text.strip())
    size = float(match[1]) * UNITS.get(match[2].upper(), 0) if match else 0.0
    if size < 1:
        raise ValueError(f"memory budget {text!r} is not usable; give a number above 0 with its unit: 24GB, 23.5GiB, 800MB")
    return int(size)


def words(size: float) -> str:
    """Bytes to read, rounded up.

    Example:
        >>> words(11_720_000_000), words(640_100_000)
        ('11.8GB', '641MB')
    """
    return f"{-(-size // 10**8) / 10:g}GB" if size >= 10**9 else f"{-(-size // 10**6):g}MB"


@dataclass(frozen=True)
class Plan:
    """How a model is run within a budget, and for which clip that was counted."""

    account: Account = field(repr=False, compare=False)
    budget: int
    way: Way
    wish: Wish

    @property
    def need(self) -> int:
        return self.account.need(self.way, self.wish)

    def check(self, shape: tuple[int, ...], guidance: float, **more: Any) -> None:
        """Raise ValueError where a clip of these latents (B, F, C, h, w) does not fit the way that was chosen."""
        clips, frames, _, height, width = shape
        wish = Wish(frames, height, width, bool(guidance), clips, **more)
        if wish.ring and self.way.cache != "whole":
            raise ValueError("a ring needs the whole cache on the device; leave it out, or give more memory")
        need = self.account.need(self.way, wish)
        if need > self.budget:
            raise ValueError(
                f"memory budget {words(self.budget)}: {self.account.clip(wish)} needs {words(need)} as the model was loaded; "
                "give that, a shorter clip, or guidance 0"
            )

    def __str__(self) -> str:
        way, account = self.way, self.account
        parts = [f"{way.precision}" + (" (approximate)" if way.precision in QUANTISED else "")]
        parts += ["cache in 8 bits (approximate)"] * (way.cache == "bytes")
        away = " and ".join(["layers"] * (way.layers == "host") + ["cache"] * (way.cache == "host"))
        if away:
            parts.append(f"{away} in the host's memory, up to {words(account.moved(way, self.wish))} to the device in each pass")
        parts += ["each part on the device only while it is used"] * way.turns + ["codec in bfloat16"] * (way.codec == "bfloat16")
        host = account.host(way, self.wish) if account.device != "cpu" else 0
        tail = f" and {words(host)} of the host's memory" if host else ""
        return f"memory: {', '.join(parts)}; {words(self.need)} of {words(self.budget)}{tail}"

    def about(self) -> dict[str, Any]:
        """For the metadata: budget, what was counted in each stage, and the way."""
        return {"budget": self.budget, "counted": self.account.stages(self.way, self.wish), **asdict(self.way)}

    def places(self, device: torch.device, flow: StarFlow, codec: Codec, text: TextEncoder | None) -> Callable[..., Any]:
        """Has parts of the model on the device while they are used: flow, denoiser, codec, text."""
        if not self.way.turns:
            return lambda *parts: nullcontext()
        deep = [flow.deep_block] if self.way.layers == "device" else []  # the rest of it is small, and stays
        parts: dict[str, list[nn.Module]] = {"flow": [*deep, flow.shallow_blocks], "codec": [codec.vae]}
        parts |= {"denoiser": [flow.denoiser]} if flow.denoiser is not None else {}
        parts |= {"text": [text.model]} if text is not None else {}
        return Parts(device, parts).use

    def settle(self, flow: StarFlow, device: torch.device) -> None:
        """Give the loaded flow its cache, and keep its layers where the way says."""
        block = flow.deep_block
        block.cache = {"whole": KVCache, "bytes": ByteCache, "host": HostCache}[self.way.cache]
        block.recorded = self.way.cache != "host"
        if self.way.layers == "host":
            stream_layers(block, device)


def choose(account: Account, wish: Wish, budget: int, precision: str, device: torch.device, flow: StarFlow, host: int | None) -> Plan:
    """The first way in the order of `ways` that fits.

    Args:
        budget: bytes of the device.
        precision: as asked; "auto" leaves it open.
        flow: on `meta`.
        host: bytes of the host's memory, where another device keeps what does not fit; None: not known, as much as it takes.

    Raises:
        ValueError: nothing fits; says the least that does.
    """
    base = settle(precision, device, sum(p.numel() for p in flow.parameters()))
    possible = [way for way in ways(base, precision == "auto", device.type, wish) if _possible(way, flow, device)]
    held = [way for way in possible if device.type == "cpu" or host is None or account.host(way, wish) <= host]
    for way in held:
        if account.need(way, wish) <= budget:
            return Plan(account, budget, way, wish)
    least = min(held or possible, key=lambda way: account.need(way, wish))
    there = words(account.need(least, wish)) + (f" and {words(account.host(least, wish))} of the host's memory" if not held else "")
    other = "" if precision == "auto" else ", or another precision"
    other += "" if find_spec("torchao") else ", or install what makes it smaller: pip install 'reelflow[quantize]'"
    raise ValueError(
        f"memory budget {words(budget)} is too small: {account.clip(wish)} needs at least {there} in {least.precision}; "
        f"give that, a shorter clip, guidance 0{other}"
    )


def ways(base: str, free: bool, device: str, wish: Wish) -> Iterator[Way]:
    """Ways of running a model, the best first.

    What keeps everything on the device comes first, then what sends for layers or cache in every pass, which is exact but waits for
    the bus; among each, the more exact first. An exact precision that was asked for waits for the bus before its cache loses bits.
    Within one way, parts stay on the device if they can, then take turns, and at last the codec computes in bfloat16.
    """
    lower = [name for name in ("bfloat16", "int8", "int4") if name != base] if free else []
    names, exact = [base, *lower], base not in QUANTISED and not free
    small = [Way(name, cache="bytes") for name in names]
    found = [Way(name) for name in (base, *lower[:-1])] + ([] if exact else small)
    if device != "cpu":
        both = [Way(name, layers, "host") for name in names for layers in ("device", "host")]
        found += [way for way in both if way.layers == "device" or way.precision not in QUANTISED]
    found += small if exact else []
    for way in found:
        if wish.ring and way.cache != "whole":
            continue
        turned = [False] if device == "cpu" else [False, True]
        vary = partial(Way, way.precision, way.layers, way.cache)
        yield from (vary(turns) for turns in turned)
        yield vary(turned[-1], "bfloat16")


def _possible(way: Way, flow: StarFlow, device: torch.device) -> bool:
    """Whether this machine, and this model, can."""
    if way.layers == "host" and not find_spec("accelerate"):
        return False
    try:
        settle(way.precision, device, 0)
        quantiser(flow, way.precision, device)
    except ValueError:
        return False
    return True


__all__ = ["Plan", "choose", "parse", "ways", "words"]
