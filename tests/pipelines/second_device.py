"""A second device beside the CPU, imitated: every tensor knows on which of the two it is, an operation over both is an error, and what
is on the second one is counted. The numbers are the CPU's.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAME = torch.device("mps")
"""PyTorch knows this name also where there is no such thing."""
ONLY_LOOKS = torch._has_compatible_shallow_copy_type
BETWEEN = {torch.Tensor.copy_, torch.Tensor.data.__set__, torch.Tensor.to, torch.Tensor.cpu, ONLY_LOOKS}  # type: ignore[attr-defined]
LEAVES = {torch.Tensor.numpy, torch.Tensor.__array__}


class SecondDevice(TorchFunctionMode):
    """live, most: bytes on it, now and at most since `most` was last set."""

    def __init__(self) -> None:
        super().__init__()
        self.there: set[int] = set()
        self.live = self.most = 0
        self.counter = Counter(self)
        self.now = False

    def __enter__(self) -> Self:
        self.counter.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.counter.__exit__(*error)

    def holds(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self.there

    def take(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.there:
            self.there.add(key)
            self.live += size
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.there.discard(key)
        self.live -= size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return NAME if self.holds(args[0]) else func(*args)
        large = {self.holds(x) for x in given if x.dim() or self.holds(x)}
        if len(large) > 1 and func not in BETWEEN:
            raise AssertionError(f"{func}: tensors of both devices")
        if func in LEAVES and True in large:
            raise AssertionError(f"{func}: on the second device")
        there, args = True in large, list(args)
        if func in BETWEEN and given:
            there = self.holds(args[0])
        asked = kwargs.get("device")
        if func is torch.Tensor.to:
            asked = asked or next((x for x in args[1:] if isinstance(x, torch.device | str)), None)
            other = next((x for x in args[1:] if isinstance(x, Tensor)), None)
            asked = asked or (None if other is None else NAME if self.holds(other) else "cpu")
            args = [torch.device("cpu") if isinstance(x, torch.device | str) and torch.device(x) == NAME else x for x in args]
        if func is torch.Tensor.cpu:
            asked = "cpu"
        if asked is not None:
            there = torch.device(asked) == NAME
            if there and "device" in kwargs:
                kwargs["device"] = "cpu"
        return self.run(func, args, kwargs, given, there)

    def run(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], there: bool) -> Any:
        before, self.now = self.now, there
        storages = {x.untyped_storage()._cdata for x in given}
        try:
            found = func(*args, **kwargs)
            if func in (torch.Tensor.to, torch.Tensor.cpu) and self.holds(found) != there:
                found = found.clone()  # on one machine nothing was moved
            for x in tree_leaves(found) if there else ():
                if isinstance(x, Tensor) and x.untyped_storage()._cdata not in storages:
                    self.take(x)  # of a list of numbers, which is nothing to the counter
            return found
        finally:
            self.now = before


class Counter(TorchDispatchMode):
    """Tells the device of every tensor that is made, also inside a function."""

    def __init__(self, device: SecondDevice):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.device.now:
            given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for x in tree_leaves(found):
                if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                    self.device.take(x)
        return found


def watched(pipe: Any, device: SecondDevice) -> dict[str, int]:
    """The most bytes on the device while parts of the pipeline are used, by the first of them; filled as it runs."""
    most, inner = dict[str, int](), pipe.use

    @contextmanager
    def use(*names: str) -> Iterator[None]:
        device.most = device.live
        with inner(*names):
            yield
        most[names[0]] = max(most.get(names[0], 0), device.most)

    pipe.use = use
    object.__setattr__(pipe.prompting, "use", use)
    return most
