"""A memory budget: the best way of running a model that keeps within it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from math import inf
from typing import Any

import torch

from reelflow.adapters.precision import QUANTISED, quantiser, settle
from reelflow.adapters.text import TextEncoder
from reelflow.adapters.vae import Codec
from reelflow.flow import StarFlow
from reelflow.pipelines.account import Account, Way, Wish
from reelflow.pipelines.offload import CACHES, DEEP_LAYERS, Parts, stream_layers

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
    if not 1 <= size < inf:
        raise ValueError(f"memory budget {text!r} is not usable; give a number above 0 with its unit: 24GB, 23.5GiB, 800MB")
    return int(size)


def words(size: float) -> str:
    """Bytes to read, rounded up to three digits.

    Example:
        >>> words(11_720_000_000), words(24_000_000_000), words(640_100_000)
        ('11.8GB', '24GB', '641MB')
    """
    unit = 10 ** max(6, len(str(int(size))) - 3)
    rounded = -(-int(size) // unit) * unit
    return f"{rounded / 10**9:g}GB" if rounded >= 10**9 else f"{rounded / 10**6:g}MB"


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
                f"give that, or a shorter clip{', or guidance 0' if wish.guidance else ''}"
            )

    def __str__(self) -> str:
        way, account, wish = self.way, self.account, self.wish
        host = f" and {words(account.host(way, wish))} of the host's memory" if account.device != "cpu" else ""
        moved = f", up to {words(account.moved(way, wish))} to the device in each pass" if account.moved(way, wish) else ""
        return f"memory: {way}{moved}; {words(self.need)} of {words(self.budget)}{host}"

    def about(self) -> dict[str, Any]:
        """For the metadata: budget, what was counted in each stage, and the way."""
        return {"budget": self.budget, "counted": self.account.stages(self.way, self.wish), **asdict(self.way)}

    def places(self, device: torch.device, flow: StarFlow, codec: Codec, text: TextEncoder | None) -> Callable[..., Any]:
        """Has parts of the model on the device while they are used: flow, denoiser, codec, text."""
        if not self.way.turns:
            return lambda *parts: nullcontext()
        but = ("denoiser.", *((DEEP_LAYERS,) if self.way.layers == "host" else ()))
        parts = {"flow": (flow, but), "denoiser": (flow.denoiser, ()), "codec": (codec.vae, ()), "text": (text and text.model, ())}
        return Parts(device, {name: part for name, part in parts.items() if part[0] is not None}).use

    def settle(self, flow: StarFlow, device: torch.device) -> None:
        """Give the loaded flow its cache, and keep its layers where the way says."""
        block = flow.deep_block
        block.cache = CACHES[self.way.cache]
        block.recorded = self.way.cache != "host"
        if self.way.layers == "host":
            stream_layers(block, device)


def choose(account: Account, wish: Wish, budget: int, found: list[Way], host: int | None) -> Plan:
    """The first of the ways that fits.

    Args:
        budget: bytes of the device.
        found: in the order of `ways`.
        host: bytes of the host's memory, where another device keeps what does not fit; None: not known, as much as it takes.

    Raises:
        ValueError: nothing fits; says the least that does.
    """
    held = [way for way in found if account.device == "cpu" or host is None or account.host(way, wish) <= host]
    for way in held:
        if account.need(way, wish) <= budget:
            return Plan(account, budget, way, wish)
    least = min(held or found, key=lambda way: account.need(way, wish))
    other = ["a shorter clip"] + ["guidance 0"] * wish.guidance + ["another precision"] * (len({way.precision for way in found}) == 1)
    tool = "" if find_spec("torchao") else "; smaller with torchao: pip install 'reelflow[quantize]'"
    raise ValueError(
        f"memory budget {words(budget)} is too small: {account.clip(wish)} needs at least "
        f"{words(account.need(least, wish))} in {least.precision}; "
        f"give that, or {', or '.join(other)}{tool}"
    )


def possible(precision: str, device: torch.device, flow: StarFlow, wish: Wish) -> list[Way]:
    """The ways that this machine, and this model, can; `flow` is on `meta`, a precision of "auto" leaves it open.

    Raises:
        ValueError: a precision that they cannot.
    """
    base = settle(precision, device, sum(p.numel() for p in flow.parameters()))
    quantiser(flow, base, device)
    return [way for way in ways(base, precision == "auto", device.type, wish) if _can(way, flow, device, wish)]


def _can(way: Way, flow: StarFlow, device: torch.device, wish: Wish) -> bool:
    gradient = flow.denoiser is None and wish.denoise  # a Tweedie step, which needs the layers again on its way back
    if way.layers == "host" and (gradient or not find_spec("accelerate")):
        return False
    try:
        settle(way.precision, device, 0)
        quantiser(flow, way.precision, device)
    except ValueError:
        return False
    return True


def ways(base: str, free: bool, device: str, wish: Wish) -> Iterator[Way]:
    """Ways of running a model, the best first.

    What keeps everything on the device comes first, then what sends for layers or cache in every pass, which is exact but waits for
    the bus; among each, the more exact first (on mini the cache in bytes costs half of what int8 does, int4 eight times as much:
    `benchmarks/budget.py --errors`). An exact precision that was asked for waits for the bus before its cache loses bits. Within one
    way, parts stay on the device if they can, then take turns, and at last the codec computes in bfloat16.

    Args:
        base: the best precision.
        free: whether lower ones may be taken.
    """
    names = [base, *(name for name in ("bfloat16", "int8", "int4") if free and name != base)]
    exact = base not in QUANTISED and not free
    found = [Way(name, cache=cache) for name in names for cache in ("whole", "bytes") if not (exact and cache == "bytes")]
    if device != "cpu":
        both = [Way(name, layers, "host") for name in names for layers in ("device", "host")]
        found += [way for way in both if way.layers == "device" or way.precision not in QUANTISED]
    found += [Way(base, cache="bytes")] * exact
    for way in found:
        if wish.ring and way.cache != "whole":
            continue
        turned = [False] if device == "cpu" else [False, True]
        vary = partial(Way, way.precision, way.layers, way.cache)
        yield from (vary(turns) for turns in turned)
        yield vary(turned[-1], "bfloat16")


__all__ = ["Plan", "choose", "parse", "possible", "ways", "words"]
