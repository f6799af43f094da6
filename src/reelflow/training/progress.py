"""What a run says of itself: one JSON line per log step, the same for TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reelflow.training import flops
from reelflow.training.config import RunConfig


class Meter:
    """Means of the steps since the last row, and the speed since the run was started.

    The means are part of a checkpoint, so that a run that is resumed writes the rows of one that never stopped.
    """

    def __init__(self, config: RunConfig, device: torch.device, ranks: int, losses: tuple[str, ...] = ("loss", "score_loss")):
        self.config, self.device, self.ranks, self.names = config, device, ranks, (*losses, "grad_norm")
        self.steps: list[tuple[float, ...]] = []
        self._peak: float | None = None
        self.restart()

    def restart(self) -> None:
        self.began, self.tokens, self.work, self.done = time.monotonic(), 0.0, 0.0, 0

    def add(self, found: dict[str, float], tokens: float, work: float) -> None:
        """Count a step. tokens, work: of its whole batch, FLOPs."""
        self.steps.append(tuple(found[key] for key in self.names))
        self.tokens += tokens
        self.work += work
        self.done += 1

    def row(self, step: int, skipped: int, waited: float, explain: Callable[[dict[str, float]], dict[str, float]]) -> dict[str, Any]:
        """The row of a log step; the means begin anew.

        Args:
            skipped: steps so far whose gradient was too large.
            waited: seconds since the start that steps waited for their data.
            explain: what the row says of the mean losses.
        """
        took = max(1e-9, time.monotonic() - self.began)
        if self._peak is None:
            self._peak = flops.peak(self.device, self.config.precision)
        means = dict(zip(self.names, np.mean(self.steps, 0).tolist(), strict=True))
        self.steps = []
        found: dict[str, Any] = {"step": step} | explain(means)
        found = {key: round(value, 5) for key, value in found.items()}
        return found | {
            "skipped": skipped,
            "tokens_per_second": round(self.tokens / took),
            "mfu": round(self.work / took / (self._peak * self.ranks), 4),
            "data_wait": round(waited / took, 4),
            "seconds_left": round((self.config.steps - step) * took / self.done),
        }

    def state(self) -> Tensor:
        return torch.tensor(self.steps, dtype=torch.float64).reshape(-1, len(self.names))

    def restore(self, state: Tensor) -> None:
        self.steps = [tuple(values) for values in state.tolist()]


class Log:
    """`log.jsonl` of a run, and its TensorBoard files where asked for.

    Args:
        step: rows after it are of a run that was cut off, and are written again.
    """

    def __init__(self, folder: Path, config: RunConfig, step: int):
        self.path = folder / "log.jsonl"
        self.board: Any = None
        if self.path.exists():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            temporary.replace(self.path)
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("tensorboard = true needs TensorBoard; install it with: pip install 'reelflow[train]'") from None
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.board:
            for key, value in row.items():
                if key != "step":
                    self.board.add_scalar(f"train/{key}", value, row["step"])

    def picture(self, name: str, picture: Any, step: int) -> None:
        """A PIL image, for TensorBoard."""
        if self.board:
            self.board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if self.board:
            self.board.close()


def _step(line: str) -> float:
    """Of a row; a line that was cut off while it was written is later than any."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
