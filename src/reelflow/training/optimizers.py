"""Which optimiser moves which weights, how fast, and how its state is named in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reelflow.training.adapter import silence
from reelflow.training.config import RunConfig, TrainConfig
from reelflow.training.muon import Muon

KEYS = ("step", "exp_avg", "exp_avg_sq", "mean")
"""What the optimisers keep of a weight."""


class Optimizers:
    """The optimisers of a run: of the network (and its text encoder), and of a flow's denoiser, whose loss is its own.

    Args:
        weights: what is trained, by name; the denoiser's begin with `flow.denoiser.`.
        names: of those that Muon may move.
    """

    def __init__(self, config: RunConfig, weights: Mapping[str, nn.Parameter], names: Collection[str]):
        self.config, self.weights = config, weights
        self.denoiser = [p for name, p in weights.items() if name.startswith("flow.denoiser.")]
        self.main = [p for name, p in weights.items() if not name.startswith("flow.denoiser.")]
        matrices = {id(weights[name]) for name in names}
        use_muon = config.optimizer == "muon"
        self.all: list[torch.optim.Optimizer] = []
        if self.main:
            self.all.append(adamw(config, [p for p in self.main if not (use_muon and id(p) in matrices)], config.lr))
        if use_muon:
            self.all.append(Muon([p for p in self.main if id(p) in matrices], config.lr))
        if self.denoiser:
            assert isinstance(config, TrainConfig)
            self.all.append(adamw(config, self.denoiser, config.denoiser_lr))

    def rates(self, step: int) -> list[float]:
        """Learning rates of all optimisers. The denoiser's runs over the steps in which it learns."""
        config = self.config
        found = [rate(config, config.lr, step, config.steps)] * len(self.all)
        if self.denoiser:
            assert isinstance(config, TrainConfig)
            found[-1] = rate(config, config.denoiser_lr, config.denoising(step), config.denoising(config.steps))
        return found

    def step(self, step: int) -> None:
        """Move the weights along their gradients, at the rates of that step."""
        for optimizer, value in zip(self.all, self.rates(step), strict=True):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(value)
                else:
                    group["lr"] = value
            with self._run_as_written():
                optimizer.step()

    def _run_as_written(self) -> AbstractContextManager[Any]:
        """torchao compiles its step for every shape of weights: worth its minutes on a GPU, not on a CPU."""
        compiles = self.config.optimizer == "adamw8bit" and next(iter(self.weights.values())).device.type == "cpu"
        return torch.compiler.set_stance("force_eager") if compiles else nullcontext()

    def forget(self) -> None:
        """Drop the gradients."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def _owned(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        names = {id(p): name for name, p in self.weights.items()}
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield names[id(parameter)], parameter, optimizer

    def state(self) -> dict[str, Tensor]:
        """`NAME.KEY` → state of a weight, in float32 whatever it is kept in; weights that never moved have none."""
        return {
            f"{name}.{key}": plain(value) for name, p, optimizer in self._owned() for key, value in optimizer.state.get(p, {}).items()
        }

    def room(self, names: Container[str]) -> dict[str, Tensor]:
        """Empty tensors for the state of those names, sharded as the weights are; for `restore`."""
        found = {}
        for name, p, optimizer in self._owned():
            counter = p.device if optimizer.param_groups[0].get("fused") else torch.device("cpu")
            for key in KEYS:
                if f"{name}.{key}" in names:
                    found[f"{name}.{key}"] = torch.zeros((), device=counter) if key == "step" else torch.zeros_like(p, requires_grad=False)
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `room` was filled with."""
        for name, p, optimizer in self._owned():
            for key in KEYS:
                value = state.get(f"{name}.{key}")
                if value is not None:
                    optimizer.state[p][key] = kept(optimizer, p, key, value)


def rate(config: RunConfig, peak: float, step: int, steps: int) -> float:
    """Learning rate at `step` of so many: linear warm-up, then cosine to `min_lr`."""
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, steps - config.warmup)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def adamw(config: RunConfig, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW, with weights on every rank and sharded ones in groups of their own."""
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if isinstance(p, DTensor) is sharded]} for sharded in (False, True)]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": config.weight_decay}
    if config.optimizer != "adamw8bit":
        return torch.optim.AdamW(groups, fused=True, **settings)
    try:
        with silence():
            from torchao.optim import AdamW8bit  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError("optimizer = adamw8bit needs torchao; install it with: pip install 'reelflow[quantize]', or use adamw") from None
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **settings)
    return optimizer


def plain(value: Tensor) -> Tensor:
    """State as ordinary values: 8-bit averages decoded. Encoded again (`kept`), some of them move by a step of their 8 bits."""
    inner = value.to_local() if isinstance(value, DTensor) else value
    if not hasattr(inner, "dequantize") or type(inner) is Tensor:
        return value
    decoded: Tensor = inner.dequantize()
    if isinstance(value, DTensor):
        return DTensor.from_local(decoded, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride())
    return decoded


def kept(optimizer: Any, parameter: nn.Parameter, key: str, value: Tensor) -> Tensor:
    """The inverse of `plain`: values as that optimiser keeps them."""
    if not hasattr(optimizer, "_new_buffer") or key == "step":
        return value
    buffer: Tensor = optimizer._new_buffer(parameter, signed=key == "exp_avg")
    buffer.copy_(value)
    return buffer
