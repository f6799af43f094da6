"""The training loop, of whatever objective: exact NLL and flow-score matching (`flow`), or diffusion (`svd`).

On one device, or on as many as torchrun starts processes: every rank takes its rows of each batch (`parallel`). On a busy CPU,
as many ranks of one thread as there are cores are faster than one process with as many threads.

A step is a function of (weights, optimiser state, step number): batches and noise come from generators seeded by (seed, step,
row), so a run that is killed and started again is bit-identical to one that never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from reelflow.adapters.checkpoint import require_match
from reelflow.training import parallel
from reelflow.training.checkpoints import Checkpoints, step_of
from reelflow.training.config import RunConfig
from reelflow.training.feed import Source
from reelflow.training.objective import Objective
from reelflow.training.optimizers import Optimizers
from reelflow.training.parallel import Ranks
from reelflow.training.progress import Log, Meter

Trained = TypeVar("Trained", bound=Objective)


class Trainer(Generic[Trained]):
    """Owns weights, optimisers, averages and the folder of one run.

    Args:
        source: gives the batch of a step.
        objective: which weights are trained, and their loss.
        folder: checkpoints and log go there; the latest checkpoint is resumed.
        ranks: this process among those of the run, see `parallel.join`; None: it is alone.

    Raises:
        ValueError: a checkpoint that does not fit; batches too small to be split.
    """

    def __init__(self, config: RunConfig, source: Source, objective: Trained, folder: Path, ranks: Ranks | None = None):
        self.config, self.objective, self.folder = config, objective, folder
        self.ranks = ranks or Ranks(torch.device(config.device))
        self.device = self.ranks.device
        self.weights = objective.weights
        self.average = {name: p.detach().clone() for name, p in self.weights.items()} if config.ema else {}
        self.optimizers = Optimizers(config, self.weights, objective.matrices)
        self.feed = objective.feed(source)
        self.meter = Meter(config, self.device, self.ranks.count, objective.losses)
        self.step = self.skipped = 0
        if self.ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
        adapters = config.lora.model_dump(mode="json") if config.lora else None
        base = config.about.revision if config.lora else None  # adapters change weights that a checkpoint does not hold
        settings = {"optimizer": config.optimizer, "seed": config.seed, "lora": adapters, "revision of init": base}
        self.checkpoints = Checkpoints(folder, config.keep, self.ranks, settings)
        if found := self.checkpoints.find():
            self.restore(found)

    def train_step(self) -> dict[str, float]:
        """One update of all weights. Returns the losses and grad_norm, of all ranks.

        Raises:
            ValueError: the loss is not finite; on all ranks, with the weights as they were before the step.
            LostRankError: another rank is gone.
        """
        with parallel.answering(self.standing):
            return self._train_step()

    def _train_step(self) -> dict[str, float]:
        config, parts = self.config, self.feed(self.step)
        losses = torch.stack([self.objective.backward(rows, self.step) for rows in parts]).sum(0)
        self.ranks.average([p.grad for p in self.weights.values() if p.grad is not None and parallel.local(p) is p])
        norm, denoiser_norm = (
            parallel.total_norm(p.grad for p in some if p.grad is not None) for some in (self.optimizers.main, self.optimizers.denoiser)
        )
        found = dict(zip(self.objective.losses, self.ranks.mean(losses).tolist(), strict=True)) | {"grad_norm": norm.item()}
        denoiser_size = denoiser_norm.item()
        if not all(map(math.isfinite, (*found.values(), denoiser_size))):
            self.optimizers.forget()
            words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items())
            raise ValueError(f"step {self.step}: {words}: not finite; lower lr or use precision=float32")
        skip = config.grad_skip and self.step >= 100 and found["grad_norm"] > config.grad_clip
        self.skipped += skip
        if not skip:
            scale_down(self.optimizers.main, found["grad_norm"] / config.grad_clip)
            scale_down(self.optimizers.denoiser, denoiser_size / config.grad_clip)
            self.optimizers.step(self.step)
        self.optimizers.forget()
        self.follow()
        shape = torch.Size((round(len(parts[0].x) / parts[0].share), *parts[0].x.shape[1:]))
        self.meter.add(found, *self.objective.work(shape, self.step))
        self.step += 1
        return found

    def follow(self) -> None:
        """Move the averages towards the weights; the first step is taken over as it is."""
        if self.average:
            average = [parallel.local(value) for value in self.average.values()]
            weights = [parallel.local(p.detach()) for p in self.weights.values()]
            torch._foreach_lerp_(average, weights, 1 - self.config.ema if self.step else 1.0)

    def run(
        self,
        on_log: Callable[[dict[str, Any]], None] = lambda row: None,
        on_sample: Callable[[Trainer[Trained]], None] = lambda trainer: None,
    ) -> None:
        """Train to the last step, logging a JSON line per `log_every` steps, saving and sampling as the configuration says.

        on_log is called on the first rank, on_sample on all of them.

        Raises:
            ValueError: as `train_step`, or the last checkpoint could not be written.
        """
        config = self.config
        self.log = Log(self.folder, config, self.step) if self.ranks.first else None
        self.meter.restart()
        self.feed.waited = 0.0
        try:
            with self.feed.ahead():
                while self.step < config.steps:
                    self.train_step()
                    if self.step % config.log_every == 0 or self.step == config.steps:
                        row = self.meter.row(self.step, self.skipped, self.feed.waited, self.objective.explain)
                        if self.log:
                            self.log.write(row)
                            on_log(row)
                    if self.step % config.save_every == 0 or self.step == config.steps:
                        self.save()
                    self.checkpoints.check()
                    if config.sample_every and self.step % config.sample_every == 0:
                        on_sample(self)
        finally:
            self.checkpoints.wait()
            if self.log:
                self.log.close()
        if self.checkpoints.failed == config.steps:
            why = f"the last checkpoint could not be written ({self.checkpoints.why})"
            raise ValueError(f"{self.folder}: {why}; free space and start the same command again")

    def standing(self) -> str:
        """Where the run could go on from, for a message."""
        good = self.checkpoints.latest()
        return f"the same command goes on from step {step_of(good)}" if good else "no checkpoint was written yet"

    # --- state

    def save(self) -> None:
        """Write a checkpoint in the background; those before stay good until it is whole."""
        counts = {"counts": torch.tensor((self.step, self.skipped)), "rows": self.meter.state()}
        state = {"weights": {name: p.detach() for name, p in self.weights.items()}, "average": self.average}
        self.checkpoints.save(self.step, state | {"optimizer": self.optimizers.state(), "run": counts})

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of any number of ranks. Raises ValueError where it is of another architecture."""
        sizes = self.checkpoints.sizes(path)
        weights = {name: p.detach() for name, p in self.weights.items()}
        own = {f"weights.{name}": tuple(p.shape) for name, p in weights.items()}
        own |= {f"average.{name}": tuple(value.shape) for name, value in self.average.items()}
        given = {name: tuple(size) for name, size in sizes.items() if name.startswith(("weights.", "average."))}
        try:
            require_match(own, given, "weights")
        except ValueError as error:
            raise ValueError(f"{path}: of another architecture ({str(error).split(': ', 2)[-1]}); give another folder") from None
        room = self.optimizers.room({name.removeprefix("optimizer.") for name in sizes})
        counts = {"counts": torch.zeros(2, dtype=torch.int64), "rows": torch.zeros(sizes["run.rows"], dtype=torch.float64)}
        self.checkpoints.load(path, {"weights": weights, "average": self.average, "optimizer": room, "run": counts})
        self.optimizers.restore(room)
        self.meter.restore(counts["rows"])
        self.step, self.skipped = counts["counts"].tolist()

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights by name, or the weights themselves where no average is kept; sharded as they are."""
        return self.average or {name: p.detach() for name, p in self.weights.items()}

def scale_down(parameters: list[nn.Parameter], times: float) -> None:
    """Divide the gradients by `times` where that makes them smaller."""
    gradients = [parallel.local(p.grad) for p in parameters if p.grad is not None]
    if gradients and times > 1:
        torch._foreach_mul_(gradients, 1 / times)
