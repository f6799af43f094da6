"""A model whose layers' weights are multiples of a power of two, so that its files take less room compressed (as git keeps them).

    python examples/coarsen.py runs/mini/model runs/coarse

The matrices inside transformer layers, 1/32 of their root mean square apart; what is around the layers (projections of latents and text,
embeddings) is small and stays as it is. What it costs, `reelflow evaluate toybox --only likelihood` says.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

from torch import Tensor

from reelflow.adapters.checkpoint import new_folder, read_weights, save_weights
from reelflow.adapters.hub import resolve

APART = 1 / 32


def coarse(weight: Tensor) -> Tensor:
    """The nearest multiples of that power of two which is nearest to `APART` times the root mean square, in the same type."""
    size = weight.float().square().mean().sqrt().item()
    unit = 2.0 ** round(math.log2(size * APART)) if size else 1.0
    return ((weight.float() / unit).round() * unit).to(weight.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="packaged name or folder")
    parser.add_argument("target", type=Path, help="new folder")
    options = parser.parse_args()
    try:
        source = resolve(options.model)
        weights = {
            name: coarse(weight) if weight.ndim == 2 and ".layers." in name else weight
            for name, weight in read_weights(source / "transformer").items()
        }
        with new_folder(options.target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer", "README.md", "train*.jsonl"))
            save_weights(weights, folder / "transformer")
            shutil.copy(source / "transformer" / "config.json", folder / "transformer")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
