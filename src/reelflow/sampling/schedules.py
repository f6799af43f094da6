"""Solving x = scale(x) · z + shift(x), where row t of (shift, scale) depends on rows before t only.

Both schedules fill the same buffers through the same parameter function (`Conditioner`). `sequential` is the oracle;
`jacobi` evaluates a window of places at once and gives the same answer within its tolerance (exactly, at tolerance 0).

Shapes: B clips, N places, n window, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil, isfinite

import torch
from torch import Tensor

from reelflow.flow import Affine
from reelflow.flow.block import FlowBlock
from reelflow.sampling.conditioner import MASK_ROWS, Conditioner
from reelflow.sampling.replay import Replay

Progress = Callable[[int], None]
silent: Progress = lambda tokens: None  # noqa: E731
PATIENCE, LOOSER = 7, 3.0
"""A token evaluated so often counts as settled at so many times the tolerance: rounding may keep it from ever lying still."""

NEVER = torch.iinfo(torch.long).max


@dataclass
class Report:
    """What a schedule did.

    passes: network passes.  evaluations: tokens evaluated for each clip (one row of guidance).  residual: largest last
    change of an accepted token, in units of its scale (0 for sequential).
    """

    passes: int = 0
    evaluations: int = 0
    residual: float = 0.0

    def __add__(self, other: Report) -> Report:
        return Report(self.passes + other.passes, self.evaluations + other.evaluations, max(self.residual, other.residual))


@dataclass(frozen=True)
class Schedule:
    """How to invert a block.

    Args:
        sampler: "jacobi" or "sequential".
        tolerance: a token counts as settled when a pass changes no channel of it by more than this, in units of the
            token's own scale; 0 settles only what cannot change any more. 0 … 0.1; None: 1e-3, or 3e-2 for layers below
            float32, whose rounding keeps tokens moving by about as much.
        window: tokens of each clip evaluated at once by jacobi, ≥ 1 (256 or a frame at most); None: 32 on a CPU, else 128.
            The result does not depend on it, within the tolerance.
    """

    sampler: str = "jacobi"
    tolerance: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.sampler not in ("jacobi", "sequential"):
            raise ValueError(f"sampler {self.sampler!r} does not exist; use jacobi or sequential")
        if self.tolerance is not None and not (isfinite(self.tolerance) and 0 <= self.tolerance <= 0.1):
            raise ValueError(f"tolerance {self.tolerance} is not usable; give a number from 0 (exact) to 0.1")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window} is not usable; give at least 1 token")

    def accuracy(self, precision: torch.dtype) -> float:
        """The tolerance where layers are in that precision."""
        return (3e-2 if precision.itemsize < 4 else 1e-3) if self.tolerance is None else self.tolerance

    def tokens(self, device: torch.device) -> int:
        """The window on that device."""
        if self.sampler == "sequential":
            return 1
        return self.window or (32 if device.type == "cpu" else 128)


class Solver:
    """One block's unknowns and how far they are known; every tensor on the device and allocated once.

    Every clip has its own position: the places before it are final. Buffers reach a window beyond the end, so that a pass
    at the end has the shape of any other.

    Args:
        name: of the block, for errors.
        z_BNC: noise of all places, in block order.
        stride: places of a frame.
    """

    def __init__(self, name: str, block: FlowBlock, z_BNC: Tensor, stride: int, schedule: Schedule, progress: Progress):
        self.name, self.block, self.stride, self.schedule, self.progress = name, block, stride, schedule, progress
        batch, _, channels = z_BNC.shape
        device = z_BNC.device
        self.window = min(schedule.tokens(device), stride, MASK_ROWS)
        self.tolerance = schedule.accuracy(block.precision)
        self.every = 1 if schedule.sampler == "sequential" or device.type == "cpu" else 8  # passes between two looks of the host
        self.z = torch.cat((z_BNC, z_BNC.new_zeros(batch, 2 * self.window, channels)), 1)
        sos = z_BNC.new_zeros(channels) if block.sos is None else block.sos
        self.stream = torch.cat((sos.expand(batch, 1, -1), self.z), 1)
        """What stands before every place: start token, then tokens; guesses from the position on."""
        self.shift, self.scale = torch.zeros_like(self.z), torch.ones_like(self.z)
        self.age = torch.zeros(self.z.shape[:2], dtype=torch.int32, device=device)
        self.at, self.base, self.limit = (torch.zeros(shape, dtype=torch.long, device=device) for shape in ((batch,), (), ()))
        self.ahead = torch.arange(self.window, device=device)
        self.residual = torch.zeros((), device=device)
        self.broken = torch.full((), NEVER, device=device)  # the first place whose final value is not finite
        self.passes = self.evaluations = 0
        self.replay = Replay(device if block.recorded else torch.device("cpu"))
        self.begin(z_BNC)

    def begin(self, z_BNC: Tensor) -> None:
        """Forget the tokens, and start from other noise."""
        self.z[:, : z_BNC.shape[1]] = z_BNC
        self.stream[:, 1:] = calm(self.z)
        self.at.fill_(self.block.first)  # without a start token, the first token is its noise
        self.age.zero_()
        self.least = self.most = self.block.first  # of `at`, as the host knows it

    @property
    def report(self) -> Report:
        """Of all that was done so far."""
        return Report(self.passes, self.evaluations, float(self.residual))

    def give(self, tokens_BNC: Tensor) -> None:
        """Set the first tokens."""
        self.least = self.most = tokens_BNC.shape[1]
        self.stream[:, 1 : 1 + self.most] = tokens_BNC
        self.at.fill_(self.most)

    def tokens(self, start: int, stop: int) -> Tensor:
        return self.stream[:, 1 + start : 1 + stop]

    def read(self, conditioner: Conditioner, base: int, start: int, stop: int) -> None:
        """Let `conditioner`, whose place 0 is our place `base`, read what stands before places `start … stop − 1`."""
        place = max(start, base + self.block.first)
        while place < stop:
            end = min(place + MASK_ROWS, (place // self.stride + 1) * self.stride, stop)  # frame by frame, as it was sampled
            inputs = self.stream[:, place:end]
            if place == base:
                inputs = torch.cat((self.stream[:, :1], inputs[:, 1:]), 1)
            places = torch.arange(place - base, end - base, device=self.z.device)[None]
            self.shift[:, place:end], self.scale[:, place:end] = conditioner(inputs, places, end - base)
            place = end

    def solve(self, conditioner: Conditioner, base: int, until: int, limit: int) -> None:
        """Go on until every clip is known up to place `until`; none goes beyond `limit`. Places before are read already."""
        step = self.next if self.schedule.sampler == "sequential" else self.slide
        self.base.fill_(base)
        self.limit.fill_(limit)
        while self.least < until:
            before, window, used = self.at.sum(), min(self.window, limit - self.least), self.most + self.window
            if self.every > 1:  # few shapes, each of them a graph: whole windows, and keys up to the end of a frame
                window, used = self.window, ceil((self.most + self.every * self.window) / self.stride) * self.stride
            used = min(used, limit + self.window) - base
            for _ in range(self.every):
                self.replay((conditioner, used), partial(step, conditioner, window, used))
            self.passes += self.every
            self.evaluations += self.every * window
            found = torch.stack((self.at.min(), self.at.max(), self.at.sum() - before, self.broken)).tolist()
            self.least, self.most, after, broken = found
            if broken != NEVER:
                raise ValueError(
                    f"{self.name}, latent frame {broken // self.stride}: values are not finite; use precision float32, or less guidance"
                )
            self.progress(after)

    def next(self, conditioner: Conditioner, window: int, used: int) -> None:
        """One token of every clip."""
        place = self.at[:1, None] - self.base
        found = conditioner(self.stream[:, self.least, None], place, used)
        new = self.stream[:, self.least + 1] = found.inverse(self.z[:, self.least, None])[:, 0]
        self.broken.clamp_(max=torch.where(new.isfinite().all(), NEVER, self.least))
        self.at += 1

    def slide(self, conditioner: Conditioner, window: int, used: int) -> None:
        """One pass of the fixed-point iteration, over a window that slides past its settled head.

        Every place of the window is evaluated from the present guesses. The first of them is final, for its inputs are; so
        is each further one whose inputs all moved by no more than the tolerance in this very pass. The window then starts
        behind them, though not beyond the end of a frame. A place that enters the window is guessed from the place one
        frame back with its own noise, shift + scale · z; in the first frame from the noise alone.
        """
        place = self.at[:, None] + self.ahead[:window]
        found = conditioner(take(self.stream, place), place - self.base, used)
        new, old = found.inverse(take(self.z, place)), take(self.stream, place + 1)
        change = ((new - old).abs() / found.scale).amax(2)
        age = self.age.gather(1, place) + 1
        tolerance = self.tolerance * torch.where(age >= PATIENCE, LOOSER, 1.0)
        run = (change <= tolerance).int().cumprod(1)
        frame_end = (self.at.div(self.stride, rounding_mode="floor") + 1) * self.stride
        settled = (1 + run[:, : window - 1].sum(1)).minimum(frame_end - self.at).minimum(self.limit - self.at)
        ahead, settled_B1 = self.ahead[:window], settled[:, None]
        self.residual.clamp_(min=change.where(ahead < settled_B1 - 1, 0.0).max())
        self.broken.clamp_(max=place.where(~new.isfinite().all(2) & (ahead < settled_B1), NEVER).min())
        put(self.stream, place + 1, calm(new))
        put(self.shift, place, found.shift)
        put(self.scale, place, found.scale)
        self.age.scatter_(1, place, age)
        self.at += settled
        self.guess(place + window)

    def guess(self, place_Bn: Tensor) -> None:
        """Fill places with the parameters of the frame before and their own noise; in the first frame with the noise."""
        back, z = (place_Bn - self.stride).clamp(min=0), take(self.z, place_Bn)
        found = Affine(take(self.shift, back), take(self.scale, back)).inverse(z)
        put(self.stream, place_Bn + 1, calm(found.where((place_Bn >= self.stride)[..., None], z)))
        self.age.scatter_(1, place_Bn, 0)


def calm(guess: Tensor) -> Tensor:
    """Zero where a wild guess is not finite: attention masks what comes later, but 0 · NaN would still reach back."""
    return guess.nan_to_num(0.0, 0.0, 0.0)


def take(x_BNC: Tensor, place_Bn: Tensor) -> Tensor:
    return x_BNC.gather(1, place_Bn[..., None].expand(-1, -1, x_BNC.shape[2]))


def put(x_BNC: Tensor, place_Bn: Tensor, values_BnC: Tensor) -> None:
    x_BNC.scatter_(1, place_Bn[..., None].expand(-1, -1, x_BNC.shape[2]), values_BnC)
