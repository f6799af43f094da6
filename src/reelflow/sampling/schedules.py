"""Solving x = scale(x) · z + shift(x), where row t of (shift, scale) depends on rows before t only.

Both schedules fill the same buffer through the same parameter function (`Conditioner`). `sequential` is the oracle;
`jacobi` evaluates a window of places at once and gives the same answer within its tolerance (exactly, at tolerance 0).

Shapes: B batch, T tokens, n window, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reelflow.sampling.conditioner import Conditioner

Progress = Callable[[int], None]


@dataclass
class Report:
    """What a schedule did.

    passes: network passes.  evaluations: tokens evaluated (one row of guidance).  residual: largest last change of an
    accepted token, in units of its scale (0 for sequential).
    """

    passes: int = 0
    evaluations: int = 0
    residual: float = 0.0

    def add(self, other: Report) -> None:
        self.passes += other.passes
        self.evaluations += other.evaluations
        self.residual = max(self.residual, other.residual)


@dataclass(frozen=True)
class Schedule:
    """How to invert a block.

    Args:
        sampler: "jacobi" or "sequential".
        tolerance: a token counts as settled when a pass changes no channel of it by more than this, in units of the
            token's own scale; 0 settles only what cannot change any more. 0 … 0.1.
        window: tokens evaluated at once by jacobi, ≥ 1.
    """

    sampler: str = "jacobi"
    tolerance: float = 1e-3
    window: int = 64

    def __post_init__(self) -> None:
        if self.sampler not in ("jacobi", "sequential"):
            raise ValueError(f"sampler {self.sampler!r} does not exist; use jacobi or sequential")
        if not (math.isfinite(self.tolerance) and 0 <= self.tolerance <= 0.1):
            raise ValueError(f"tolerance {self.tolerance} is not usable; give a number from 0 (exact) to 0.1")
        if self.window < 1:
            raise ValueError(f"window {self.window} is not usable; give at least 1 token")

    def solve(self, conditioner: Conditioner, stream: Tensor, z_BTC: Tensor, known: int, stride: int, progress: Progress) -> Report:
        """Fill `stream` in place from place `known` on.

        Args:
            stream: (B, 1 + T, C) float32: start token, then tokens; the first `known` tokens are given.
            z_BTC: noise of all places.
            stride: tokens of a latent frame; the place one stride back serves as a first guess.
        """
        with torch.no_grad():
            if conditioner.block.first and known == 0:  # no start token: the first token is its noise
                stream[:, 1], known = z_BTC[:, 0], 1
            if known:
                read = stream[:, conditioner.block.first : known]
                if read.shape[1]:
                    conditioner(read, conditioner.block.first)
            if self.sampler == "sequential":
                return sequential(conditioner, stream, z_BTC, known, progress)
            return jacobi(conditioner, stream, z_BTC, known, stride, self.window, self.tolerance, progress)


def sequential(conditioner: Conditioner, stream: Tensor, z_BTC: Tensor, known: int, progress: Progress) -> Report:
    """One token a pass."""
    places = z_BTC.shape[1]
    for t in range(known, places):
        stream[:, t + 1] = conditioner(stream[:, t : t + 1], t).inverse(z_BTC[:, t : t + 1])[:, 0]
        progress(1)
    return Report(places - known, places - known)


def jacobi(
    conditioner: Conditioner, stream: Tensor, z_BTC: Tensor, known: int, stride: int, window: int, tolerance: float, progress: Progress
) -> Report:
    """Fixed-point iteration over a window that slides past its settled head.

    Every pass evaluates places `s … s + n − 1` from the present guesses. The first of them is final, for its inputs
    are; so is each further one whose inputs all moved by no more than `tolerance` in this very pass. The window then
    starts behind them. A place that enters the window is guessed from the place one frame back with its own noise,
    shift + scale · z; in the first frame from the noise alone.
    """
    places = z_BTC.shape[1]
    report = Report()
    shift, scale = torch.zeros_like(z_BTC), torch.ones_like(z_BTC)
    s, entered = known, known
    while s < places:
        stop = min(s + window, places)
        new_places = torch.arange(entered, stop, device=z_BTC.device)
        back = torch.where(new_places - stride >= known, new_places - stride, new_places)
        stream[:, entered + 1 : stop + 1] = shift[:, back] + scale[:, back] * z_BTC[:, entered:stop]
        entered = stop
        found = conditioner(stream[:, s:stop], s)
        new, old = found.inverse(z_BTC[:, s:stop]), stream[:, s + 1 : stop + 1]
        change = ((new - old).abs() / found.scale).amax((0, 2))
        shift[:, s:stop], scale[:, s:stop] = found
        moved = (change > tolerance).tolist()
        settled = 1 + (moved.index(True) if True in moved else len(moved) - 1)
        stream[:, s + 1 : stop + 1] = new
        report.add(Report(1, stop - s, float(change[: settled - 1].max()) if settled > 1 else 0.0))
        s += settled
        progress(settled)
    return report
