"""A model whose layers' weights are multiples of a power of two, so that its files take less room compressed (as git keeps them).

    python examples/coarsen.py runs/mini/model runs/coarse
    python examples/coarsen.py runs/adapter/adapter.safetensors runs/coarse.safetensors

The matrices inside transformer layers, 1/32 of their root mean square apart; what is around the layers (projections of latents and text,
embeddings) is small and stays as it is. Of a LoRA all matrices, 1/16 apart: they only say what changes. What it costs,
`reelflow evaluate toybox --only likelihood` says.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

from torch import Tensor

from reelflow.adapters import lora
from reelflow.adapters.checkpoint import new_folder, save_weights
from reelflow.adapters.hub import resolve
from reelflow.adapters.lora import Lora, flow_weights

APART, APART_IN_LORA = 1 / 32, 1 / 16


def coarse(weight: Tensor, apart: float) -> Tensor:
    """The nearest multiples of that power of two which is nearest to `apart` times the root mean square, in the same type."""
    size = weight.float().square().mean().sqrt().item()
    unit = 2.0 ** round(math.log2(size * apart)) if size else 1.0
    return ((weight.float() / unit).round() * unit).to(weight.dtype)


def coarse_model(source: Path, target: Path) -> None:
    weights = {
        name: coarse(weight, APART) if weight.ndim == 2 and ".layers." in name else weight
        for name, weight in flow_weights(source / "transformer").items()
    }
    with new_folder(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer", "README.md", "train*.jsonl"))
        save_weights(weights, folder / "transformer")
        shutil.copy(source / "transformer" / "config.json", folder / "transformer")


def coarse_lora(source: Path, target: Path) -> None:
    if target.exists():
        raise ValueError(f"{target}: exists already; choose another name")
    given = Lora.open(source)
    lora.save(target, {name: coarse(matrix, APART_IN_LORA) for name, matrix in given.tensors.items()}, given.about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="packaged name or folder, or the file of a LoRA")
    parser.add_argument("target", type=Path, help="new folder, or file")
    options = parser.parse_args()
    try:
        source = resolve(options.model)
        (coarse_model if source.is_dir() else coarse_lora)(source, options.target)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
