"""What the loop does not know: which weights are trained, and what is minimised. A flow's: `training.flow`; diffusion's: `training.svd`."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reelflow.training.feed import Feed, Source


class Objective(Protocol):
    """Made for one run; its weights are on the run's device."""

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name."""

    @property
    def matrices(self) -> frozenset[str]:
        """Names of those that Muon may move."""

    @property
    def losses(self) -> tuple[str, ...]:
        """What `backward` returns, the first one being `loss`."""

    def feed(self, source: Source) -> Feed[Any]:
        """The rows of batches for this rank."""

    def backward(self, rows: Any, step: int) -> Tensor:
        """Leave the gradients of some rows on the weights. Returns their share of each of the losses, times the number of ranks."""

    def separate(self, step: int) -> bool:
        """Whether, at a step, weights learn that have an optimiser of their own (`optimizers.Optimizers`)."""

    def work(self, shape: torch.Size, step: int) -> tuple[float, float]:
        """Tokens of a batch (B, F, C, h, w), and FLOPs of the step that it makes."""

    @staticmethod
    def explain(means: dict[str, float]) -> dict[str, float]:
        """Mean losses as a row of the log begins with them."""
