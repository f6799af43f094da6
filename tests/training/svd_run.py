"""A run of Stable Video Diffusion at the smallest size its classes allow, on toybox in 64 × 64 pixels; also as one of several ranks.

    python svd_run.py FOLDER NAME     trains to the end in FOLDER/NAME, as torchrun starts it; `write` was called before
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from reelflow.training import parallel
from reelflow.training.latents import prepare
from reelflow.training.parallel import Ranks
from reelflow.training.run import open_objective, open_source
from reelflow.training.svd.config import SvdConfig
from reelflow.training.svd.objective import SvdObjective
from reelflow.training.trainer import Trainer

tiny = runpy.run_path(str(Path(__file__).parent.parent / "pipelines" / "svd_tiny.py"))
SETTINGS: dict[str, Any] = {
    "about": {"family": "svd", "name": "tiny-svd", "size": 64, "frames": 4, "tasks": ["animate"]},
    "unet": {
        "down_block_types": tiny["BLOCKS"][0], "up_block_types": tiny["BLOCKS"][1], "block_out_channels": [32, 64], "layers_per_block": 1,
        "num_attention_heads": [2, 2], "addition_time_embed_dim": 32,
    },
    "image_encoder": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 32,
        "projection_dim": 32,
    },
    "data": {"toybox": {"count": 5}, "frames": 9, "posterior": "mean"},
    "stages": [{"steps": 4, "buckets": [{"frames": 3, "batch": 3}, {"frames": 4, "batch": 2}]}],
    "lr": 1e-3, "warmup": 2, "precision": "float32", "save_every": 2, "log_every": 1, "ema": 0.5, "grad_skip": False,
}  # fmt: skip


def settings(folder: Path, **more: Any) -> SvdConfig:
    return SvdConfig.parse(SETTINGS | {"vae": str(folder / "vae"), "latents": str(folder / "latents")} | more)


def write(folder: Path, **more: Any) -> SvdConfig:
    """The VAE, and what is prepared with it."""
    tiny["tiny_vae"]().save_pretrained(str(folder / "vae"))
    config = settings(folder, **more)
    prepare(config)
    return config


def make(config: SvdConfig, folder: Path, ranks: Ranks | None = None) -> Trainer[SvdObjective]:
    ranks = ranks or Ranks(torch.device("cpu"))
    source = open_source(config, folder, ranks)
    return Trainer(config, source, open_objective(config, source, ranks), folder, ranks)


def weights(trainer: Trainer[SvdObjective]) -> dict[str, torch.Tensor]:
    found = {name: p.detach().contiguous() for name, p in trainer.weights.items()}
    return found | {f"average.{name}": value.contiguous() for name, value in trainer.average.items()}


def main(folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    config = settings(folder)
    ranks = parallel.join(config)
    trainer = make(config, folder / name, ranks)
    trainer.run()
    if ranks.first:
        save_file(weights(trainer), folder / name / "weights.safetensors")
    parallel.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
