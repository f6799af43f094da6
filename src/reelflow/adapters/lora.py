"""Low-rank adapters of a flow or of a UNet (LoRA, Hu et al. 2021): one small safetensors file, read, applied and merged, strictly.

    NAME.lora_A.weight (rank, in) and NAME.lora_B.weight (out, rank) for every adapted linear layer NAME of the flow

say W + weight · alpha / rank · B A in place of its W. The header's `reelflow_lora` (JSON) holds rank, alpha, targets, and the
model and revision that it was trained on. One that lies in a flow's own folder belongs to it, see `flow_weights`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelflow.adapters.checkpoint import SHARD_BYTES, MappedWeights, few, new_folder, read_weights, write_shards, written
from reelflow.adapters.svd import is_svd, part_weights, read_about
from reelflow.config import ModelConfig

HEADER = "reelflow_lora"
OWN = "adapter.safetensors"
"""The adapter in a flow's folder `transformer/` that is a part of it: a revision of a model in a file as small as a LoRA."""
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Lora:
    """An adapter file. about: its header."""

    path: Path
    about: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Lora:
        """Read. Raises ValueError where it is none of ours, or incomplete."""
        from safetensors import safe_open

        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file; give the .safetensors file of a LoRA, trained with a configuration that has lora")
        tensors = read_weights(path)
        with safe_open(str(path), "pt") as file:
            said = (file.metadata() or {}).get(HEADER)
        names = {name.removesuffix(DOWN).removesuffix(UP) for name in tensors}
        if said is None or set(tensors) != {name + end for name in names for end in (DOWN, UP)}:
            raise ValueError(f"{path}: not a LoRA of this package (its header or some of its matrices are missing)")
        return cls(path, json.loads(said), tensors)

    @property
    def layers(self) -> list[str]:
        """Names of the adapted linear layers."""
        return sorted(name.removesuffix(DOWN) for name in self.tensors if name.endswith(DOWN))

    def change(self, layer: str, weight: float = 1.0) -> Tensor:
        """What is added to a layer's matrix, float32 (out, in)."""
        down, up = (self.tensors[layer + end].float() for end in (DOWN, UP))
        return weight * self.about["alpha"] / self.about["rank"] * (up @ down)

    def require_fit(self, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
        """Raise ValueError where a model with weights of those shapes, called so, is of another architecture."""
        wrong = []
        for layer in self.layers:
            own = (self.tensors[layer + UP].shape[0], self.tensors[layer + DOWN].shape[1])
            given = shapes.get(f"{layer}.weight")
            if given is None or tuple(given) != own:
                wrong.append(f"{layer} {own} instead of {'none' if given is None else tuple(given)}")
        if wrong:
            raise ValueError(
                f"{self.path}: a LoRA of another architecture than {name}: {len(wrong)} layers do not fit ({few(wrong, 1)}); it was "
                f"trained on {self.about['model']}"
            )

    def note(self, about: ModelConfig) -> None:
        """Say so where it was trained on another model or revision."""
        if (self.about["model"], self.about["revision"]) != (about.name, about.revision):
            trained, here = f"{self.about['model']} revision {self.about['revision']}", f"{about.name} revision {about.revision}"
            message = f"{self.path.name} was trained on {trained}, this is {here}; it may do something else here"
            warnings.warn(message, UserWarning, stacklevel=3)


class Adapted(Mapping[str, Tensor]):
    """Weights with adapters' changes added as each is read, in the type it is stored in.

    Args:
        loras: adapters with their weights.
        name: what an error calls the model. Raises ValueError for one of another architecture.
    """

    def __init__(self, weights: Mapping[str, Tensor], loras: Sequence[tuple[Lora, float]], name: str):
        self.weights, self.loras, self.source = weights, loras, name
        self.changed = frozenset(f"{layer}.weight" for lora, _ in loras for layer in lora.layers)
        shapes = {key: tuple(weights[key].shape) for key in self.changed if key in weights}
        for lora, _ in loras:
            lora.require_fit(shapes, name)

    def __getitem__(self, name: str) -> Tensor:
        weight, layer = self.weights[name], name.removesuffix(".weight")
        if name not in self.changed:
            return weight
        changes = [lora.change(layer, share) for lora, share in self.loras if layer + DOWN in lora.tensors]
        return (weight.float() + torch.stack(changes).sum(0)).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def flow_weights(folder: Path) -> MappedWeights | Adapted:
    """The weights of a flow's folder `transformer/`, with the adapter in it, if there is one. Raises ValueError as `read_weights`."""
    weights, own = read_weights(folder), folder / OWN
    return Adapted(weights, [(Lora.open(own), 1.0)], str(folder)) if own.is_file() else weights


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write an adapter in bfloat16."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    with written(path) as temporary:
        save_file(state, temporary, {HEADER: json.dumps(about)})


def parse(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:WEIGHT`.

    Example:
        >>> parse("heart.safetensors:0.8")
        (PosixPath('heart.safetensors'), 0.8)
    """
    file, colon, number = text.rpartition(":")
    try:
        return (Path(file), float(number)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


@torch.no_grad()
def apply(lora: Lora, parameters: Mapping[str, torch.nn.Parameter], about: ModelConfig, weight: float = 1.0) -> None:
    """Add an adapter to a flow's parameters, in the precision they have. Raises ValueError where it does not fit."""
    lora.require_fit({name: tuple(p.shape) for name, p in parameters.items()}, about.name)
    lora.note(about)
    for layer in lora.layers:
        p = parameters[f"{layer}.weight"]
        p.data = (p.float() + lora.change(layer, weight).to(p.device)).to(p.dtype)


def merge(
    model: Path, loras: Sequence[tuple[Lora, float]], output: Path, progress: Callable[[int, int], None] | None = None
) -> ModelConfig:
    """Write a model folder that is `model` with adapters added, file by file.

    Args:
        loras: adapters with their weights.
        progress: called with (bytes written, bytes in all).

    Raises:
        ValueError: no model folder there, an adapter of another architecture, or the output exists.
    """
    if not model.is_dir():
        raise ValueError(f"{model}: a single file; adapters are merged into folders (or are added as the model is used, with --lora)")
    diffuses = is_svd(model)
    part, stem = ("unet", "diffusion_pytorch_model") if diffuses else ("transformer", "model")
    about = read_about(model) if diffuses else ModelConfig.read(model / "config.json")
    weights = Adapted(part_weights(model / part, stem) if diffuses else flow_weights(model / part), loras, about.name)
    for lora, _ in loras:
        lora.note(about)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in weights.items()}

    def read(names: list[str]) -> dict[str, Tensor]:
        return {name: weights[name] for name in names}

    merged = about.model_copy(update={"name": "-".join([about.name, *(lora.path.stem for lora, _ in loras)])})
    with new_folder(output) as folder:
        for path in sorted(path for path in model.iterdir() if path.is_dir()):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("*.safetensors*") if path.name == part else None)
        if diffuses:
            shutil.copy(model / "model_index.json", folder)
        write_shards(sizes, read, folder / part, SHARD_BYTES, stem, progress)
        merged.write(folder / "config.json")
        lines = "\n".join(f"- {lora.path.name}, weight {weight:g}: {json.dumps(lora.about)}" for lora, weight in loras)
        (folder / "README.md").write_text(f"# {merged.name}\n\n{about.name} revision {about.revision} with:\n\n{lines}\n", encoding="utf-8")
    return merged
