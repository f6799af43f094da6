"""A run of the real trainer at the smallest size, on Gaussian latents, always from the same weights; also one of several ranks.

    python tiny.py FOLDER JOB …       what every JOB comes to, in FOLDER/JOB, as torchrun starts it (RANK in the environment)

REELFLOW_KILL="RANK STEP" ends that rank by SIGKILL when it makes that step's batch, "RANK write" when it renames a checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reelflow.adapters import lora
from reelflow.adapters.checkpoint import save_weights
from reelflow.adapters.text import TextEncoder
from reelflow.flow import StarFlow
from reelflow.training import parallel
from reelflow.training.batches import Batch
from reelflow.training.config import TrainConfig
from reelflow.training.flow import FlowObjective
from reelflow.training.parallel import Ranks
from reelflow.training.trainer import Trainer

CAPTIONS = ["a red ball moves right", "a blue box stays still", "a green star circles", ""]
SETTINGS: dict[str, Any] = {
    "about": {"family": "starflow-v", "name": "tiny", "size": 64, "frames": 5},
    "flow": {
        "channels": 3, "width": 24, "deep_width": 48, "layers": [1, 1, 2], "head_dim": 24, "window": 2, "text_tokens": 6, "text_dim": 8,
        "position_span": 4, "noise_std": 0.5, "denoiser": {"layers": 1, "width": 24},
    },
    "latents": "latents", "vae": "vae", "text": {"width": 8, "layers": 1, "heads": 2, "vocabulary": 300},
    "stages": [{"steps": 6, "buckets": [{"task": "generate", "frames": 2, "batch": 4}]}],
    "lr": 3e-3, "denoiser_lr": 1e-3, "warmup": 2, "grad_skip": False, "precision": "float32", "save_every": 2, "log_every": 2,
}  # fmt: skip
ROWS: dict[str, Any] = {"stages": [{"steps": 6, "buckets": [{"task": "generate", "frames": 2, "batch": 5}]}]}
STAGE = ROWS["stages"][0]
FORESIGHT: dict[str, Any] = {"stages": [STAGE | {"steps": 4, "denoiser": False, "foresight": 0.5}, STAGE | {"steps": 2}]}
WIDE = SETTINGS["flow"] | {"width": 64, "deep_width": 128, "head_dim": 32, "denoiser": {"layers": 1, "width": 64}}
JOBS: dict[str, dict[str, Any]] = {
    "alone": {},
    "parts": {"accumulate": 2},
    "sharded": {"shards": 2, "accumulate": 2, "recompute": True},
    "offloaded": {"shards": 1, "offload": True},
    "bfloat16": {"shards": 2, "precision": "bfloat16"},
    "foresight": FORESIGHT,
    "antithetic": {"stages": [STAGE | {"antithetic": True}]},
    "sharded antithetic": {"stages": [STAGE | {"antithetic": True}], "shards": 2, "accumulate": 2},
    "sharded foresight": FORESIGHT | {"shards": 2, "recompute": True},
    "muon": {"optimizer": "muon", "shards": 1},
    "sharded muon": {"optimizer": "muon", "shards": 2},
    "wide": {"flow": WIDE, "lr": 1e-3},
    "8 bits": {"flow": WIDE, "lr": 1e-3, "optimizer": "adamw8bit"},
    "sharded 8 bits": {"flow": WIDE, "lr": 1e-3, "optimizer": "adamw8bit", "shards": 2},
    "adapters": {"lora": {"rank": 2}, "text": "nowhere"},
    "sharded adapters": {"lora": {"rank": 2}, "text": "nowhere", "shards": 2},
}


class Text(TextEncoder):
    """States of prompts without a library's tokenizer and layers, by their length; trained along."""

    def __init__(self, width: int = 8, tokens: int = 6):
        super().__init__(nn.Embedding(64, width), None, tokens)

    def states(self, prompts: list[str]) -> Tensor:
        places = torch.arange(self.tokens)[None] + torch.tensor([len(prompt) for prompt in prompts])[:, None]
        return self.model(places)


def fill(module: nn.Module, seed: int) -> None:
    """Weights that do not depend on how a library initialises its layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            spread = 0.1 if parameter.ndim == 1 else 0.5 * parameter.shape[-1] ** -0.5
            values = spread * torch.randn(parameter.shape, generator=generator)
            values = values + ("norm" in name)
            own = parallel.local(parameter)
            own.copy_(values if own is parameter else _part(values, parameter))


def _part(values: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, like.device_mesh, like.placements).to_local()


def latents(step: int, rows: int = 4) -> Tensor:
    return 0.3 * torch.randn(rows, 2, 3, 2, 2, generator=torch.Generator().manual_seed(step)) + 1.0


def make(folder: Path, values: dict[str, Any] | None = None, ranks: Ranks | None = None, text: TextEncoder | None = None) -> Trainer:
    """A trainer whose weights begin the same whatever its ranks."""
    config = TrainConfig.parse(SETTINGS | (values or {}))
    kill = os.environ.get("REELFLOW_KILL", "").split()

    def source(step: int) -> Batch:
        rows = config.stage(step).buckets[0].batch
        if kill and kill == [str(ranks.rank if ranks else 0), str(step)]:
            os.kill(os.getpid(), signal.SIGKILL)
        return Batch(latents(step, rows), [CAPTIONS[row % 4] for row in range(rows)])

    torch.manual_seed(5)
    text = text or Text()
    fill(text.model, 2)
    trainer = Trainer(config, source, FlowObjective(config, text, ranks), folder, ranks)
    if not trainer.step and not config.init:
        fill(trainer.objective.flow, 1)
    if kill and kill == [str(ranks.rank if ranks else 0), "write"]:
        Path.rename = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign,return-value]
    return trainer


def write_base(folder: Path) -> None:
    """What runs that begin with a model need of it, in FOLDER/base: one with an adapter of its own."""
    config = TrainConfig.parse(SETTINGS)
    flow = StarFlow(config.flow)
    fill(flow, 1)
    save_weights(flow.state_dict(), folder / "base" / "transformer")
    layer, width = "deep_block.layers.0.attention.proj", 48
    shapes = {layer + lora.DOWN: (2, width), layer + lora.UP: (width, 2)}
    tensors = {name: 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(3)) for name, shape in shapes.items()}
    lora.save(folder / "base" / "transformer" / lora.OWN, tensors, {"rank": 2, "alpha": 2, "model": "tiny", "revision": "0"})
    config.flow.write(folder / "base" / "transformer" / "config.json")
    config.about.write(folder / "base" / "config.json")


def values_of(name: str, folder: Path) -> dict[str, Any]:
    values = ROWS | JOBS[name] | {"log_every": 1, "save_every": 2 if name in ("alone", "sharded") else 6}
    return values | ({"init": str(folder / "base")} if "lora" in values else {})


def job(name: str, folder: Path, ranks: Ranks | None = None) -> Trainer:
    """Run a job to its end; its weights go to FOLDER/NAME/weights.safetensors."""
    torch.set_num_threads(1)
    trainer = make(folder / name, values_of(name, folder), ranks)
    trainer.run()
    state = {name: parallel.full(p.detach()).float().contiguous() for name, p in trainer.weights.items()}
    state |= {f"average.{name}": parallel.full(value).float().contiguous() for name, value in trainer.average.items()}
    if trainer.ranks.first:
        save_file(state, folder / name / "weights.safetensors")
    return trainer


def stops(folder: Path, ranks: Ranks) -> None:
    """A run in which the second row, which is the second rank's, is not finite from step 3 on; what every rank says of it."""
    trainer = make(folder, None, ranks)
    source, before = trainer.feed.source, dict[str, Tensor]()

    def spoilt(step: int) -> Batch:
        batch = source(step)
        if step == 3:
            batch.latents[1, 0, 0, 0, 0] = float("nan")
        return batch

    trainer.feed.source = spoilt
    for _ in range(3):
        trainer.train_step()
    before = {name: p.detach().clone() for name, p in trainer.weights.items()}
    try:
        trainer.train_step()
    except ValueError as error:
        same = all(torch.equal(p, before[name]) for name, p in trainer.weights.items())
        (folder / f"{ranks.rank}.json").write_text(json.dumps([str(error), trainer.step, same]))


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        ranks = parallel.join(TrainConfig.parse(SETTINGS | ({} if name == "not finite" else values_of(name, folder))))
        try:
            if name == "not finite":
                stops(folder / name, ranks)
            else:
                job(name, folder, ranks)
        except parallel.LostRankError as error:
            sys.exit(f"LostRankError: {error}")
    parallel.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
