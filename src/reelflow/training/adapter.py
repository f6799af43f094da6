"""Low-rank adapters in a network that is trained: put in by peft, taken out as one small file (`adapters.lora`)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reelflow.adapters import lora
from reelflow.adapters.hub import resolve
from reelflow.config import ModelConfig
from reelflow.training.config import LoraConfig

if TYPE_CHECKING:
    from reelflow.training.trainer import Trainer


def targets(flow: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the linear layers that the patterns mean. Raises ValueError for a pattern that means none."""
    linear = [name for name, module in flow.named_modules() if isinstance(module, nn.Linear)]
    for pattern in config.targets:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise ValueError(f"lora.targets: no linear layer is named {pattern!r}; such as: {', '.join(linear[-3:])}")
    return [name for name in linear if any(fnmatchcase(name, pattern) for pattern in config.targets)]


def add_adapters(flow: nn.Module, config: LoraConfig) -> None:
    """Put adapters beside the matrices, in place; only they are trained from here on."""
    names = targets(flow, config)
    with silence():
        try:
            from peft import LoraConfig as PeftConfig
            from peft import inject_adapter_in_model
        except ImportError:
            raise ValueError("lora needs peft; install it with: pip install 'reelflow[train]'") from None
    flow.requires_grad_(False)
    settings: Any = PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names, bias="none")  # type: ignore[arg-type]  # alpha may be a fraction
    with silence():
        inject_adapter_in_model(settings, flow)
    for name, parameter in flow.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = parameter.data.float()


@contextmanager
def silence() -> Iterator[None]:
    """Libraries tell of optional parts that are missing, and that a model is not of transformers."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def fill_adapters(flow: nn.Module, seed: int) -> None:
    """Values to begin with: A random, B zero, so that the flow is what it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in flow.named_parameters():
            if ".lora_A." in name:
                bound = p.shape[1] ** -0.5
                p.copy_(torch.rand(p.shape, generator=generator) * 2 * bound - bound)
            elif ".lora_B." in name:
                p.zero_()


def taken_out(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters by the names they have in their file."""
    found = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    return {name.removeprefix("flow.").removeprefix("unet.").replace(".default.", "."): tensor for name, tensor in found.items()}


def about(config: LoraConfig, model: ModelConfig, base: ModelConfig) -> dict[str, Any]:
    """The header of an adapter's file. base: the model it belongs to."""
    return {**config.model_dump(mode="json"), "name": model.name, "model": base.name, "revision": base.revision}


def export(trainer: Trainer[Any], read: Callable[[Path], ModelConfig]) -> Path:
    """Write the averaged adapters as one file named after the model, `about.name`. All ranks call it, the first one writes.

    read: what the folder of the model that the run began with says of itself.
    """
    config = trainer.objective.config
    target = trainer.folder / f"{config.about.name}.safetensors"
    if trainer.ranks.first:
        lora.save(target, taken_out(trainer.averaged()), about(config.lora, config.about, read(resolve(config.init))))
    return target
