"""What a rank is fed: its rows of every batch, with the data noise, made while the step before is computed.

Shapes: B rows, F latent frames, C channels, h × w places.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from reelflow.adapters.text import wrap_prompt
from reelflow.likelihood import add_noise
from reelflow.training.batches import Batch
from reelflow.training.config import RunConfig, TrainConfig

R = TypeVar("R")


class Source(Protocol):
    def __call__(self, step: int) -> Any:
        """The batch of a step, with its `size` (rows): a function of the step alone."""


class Rows(NamedTuple):
    """Some rows of a batch."""

    x: Tensor
    """Noisy latents (B, F, C, h, w)."""
    clean: Tensor
    """The same without noise."""
    prompts: list[str]
    noise_std_B: Tensor
    """σ of every row."""
    share: float
    """Of these rows among all of the batch."""
    learned_BF: Tensor | None = None
    """1 for the frames that count, 0 for the others; None: all of them count."""


class Feed(Generic[R]):
    """`feed(step)`: this rank's rows, in `accumulate` parts of about equal size, and how many rows and values the batch has.

    The rows of rank r of n are r, r + n, …; noise and its level come from a generator for (seed, step, row), so that nothing
    depends on how the rows are split. `waited`: seconds that steps had to wait for their data.
    """

    def __init__(self, config: RunConfig, source: Source, rank: int = 0, ranks: int = 1, pin: bool = False):
        self.steps, self.accumulate, self.source, self.pin = config.steps, config.accumulate, source, pin
        self.rank, self.ranks = rank, ranks
        self.waited = 0.0
        self._worker: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[list[R]]] | None = None
        for stage in config.stages:
            for bucket in stage.buckets:
                if bucket.batch < ranks * config.accumulate:
                    raise ValueError(
                        f"a batch of {bucket.batch} ({bucket.task}) cannot be split over {ranks} ranks × accumulate = {config.accumulate}; "
                        "make it larger"
                    )

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Within the block, what follows is made in the background."""
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as self._worker:
            try:
                yield
            finally:
                self._worker, self._next = None, None

    def __call__(self, step: int) -> list[R]:
        began = time.perf_counter()
        if self._next is not None and self._next[0] == step:
            rows = self._next[1].result()
        else:
            rows = self.rows(step)
        self.waited += time.perf_counter() - began
        if self._worker is not None:
            self._next = (step + 1, self._worker.submit(self.rows, step + 1)) if step + 1 < self.steps else None
        return rows

    def rows(self, step: int) -> list[R]:
        """Of a step, whatever was asked before."""
        batch = self.source(step)
        own = range(self.rank, batch.size, self.ranks)
        return [self.part(batch, step, own[part :: self.accumulate]) for part in range(self.accumulate)]

    def part(self, batch: Any, step: int, rows: Sequence[int]) -> R:
        """Some rows of a batch, with all that is drawn for them."""
        raise NotImplementedError


def row_generator(seed: int, step: int, row: int) -> torch.Generator:
    """What is drawn for a row of a step."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step, row)).generate_state(1)[0]))


class FlowFeed(Feed[Rows]):
    """Noisy latents and prompts; in an antithetic stage all rows once more, with the opposite noise."""

    def __init__(self, config: TrainConfig, source: Source, rank: int = 0, ranks: int = 1, pin: bool = False):
        super().__init__(config, source, rank, ranks, pin)
        self.config = config

    def part(self, batch: Batch, step: int, rows: Sequence[int]) -> Rows:
        clean, noisy, prompts, levels = [], [], [], []
        low, high = self.config.noise_range or (self.config.flow.noise_std,) * 2
        for row in rows:
            generator = row_generator(self.config.seed, step, row)
            level = low if low == high else low + (high - low) * float(torch.rand((), generator=generator))
            clean.append(batch.latents[row])
            noisy.append(add_noise(clean[-1], level, generator))
            prompts.append(self._told(batch.prompts[row], level))
            levels.append(level)
        x, without_noise = torch.stack(noisy), torch.stack(clean)
        if self.config.stage(step).antithetic:
            x, without_noise = torch.cat((x, 2 * without_noise - x)), torch.cat((without_noise, without_noise))
            prompts, levels = 2 * prompts, 2 * levels
        learned_BF = None if batch.learned_BF is None else batch.learned_BF[list(rows)].repeat(len(x) // len(rows), 1)
        if self.pin:
            x, without_noise = x.pin_memory(), without_noise.pin_memory()
        return Rows(x, without_noise, prompts, torch.tensor(levels), len(rows) / batch.size, learned_BF)

    def _told(self, prompt: str, level: float) -> str:
        """The prompt, which is wrapped for the model's own noise level, with the level that was drawn."""
        if self.config.noise_range is None:
            return prompt
        own, drawn = (
            wrap_prompt("", fps=None, image=False, noise_std=noise_std, aspect=None) for noise_std in (self.config.flow.noise_std, level)
        )
        assert own in prompt
        return prompt.replace(own, drawn, 1)
