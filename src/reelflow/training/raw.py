"""Training on clips as they are: decoded in threads ahead of need, encoded when their batch is asked for.

Shapes: F latent frames, C channels, h × w places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reelflow.adapters.text import TextEncoder
from reelflow.data.ahead import ahead
from reelflow.data.decode import Measure, Piece, View
from reelflow.data.failures import Failures, UnusableError
from reelflow.data.opening import copied, open_sources
from reelflow.data.source import Joined, Sample
from reelflow.training.batches import Batch, Plan, Planner, PromptPlanner, Rows, finish, needed
from reelflow.training.config import AnyBucket, RunConfig, TrainConfig
from reelflow.training.encoder import Encoder, Lengths, view_of
from reelflow.training.shards import Entry


class Pieces:
    """Clips for the rows of batches, as frames, decoded in threads ahead of need.

    A clip that turns out not to be usable is counted, named in `failures.jsonl`, and the next one of the epoch's order stands in.

    Args:
        folder: of the run, for `failures.jsonl`.
        view, lengths: how the model sees clips, and how long they are taken.
        planner: makes the batches of what there is.
        rank, ranks: rows rank, rank + ranks, … are decoded ahead; any other row when it is asked for.

    Raises:
        ValueError: a source that cannot be read, too many clips that cannot be used, a bucket for which no clip is long enough.
    """

    def __init__(
        self, config: RunConfig, folder: Path, view: View, lengths: Lengths, planner: Callable[[Any, Sequence[Entry], object], Planner],
        rank: int = 0, ranks: int = 1,
    ):  # fmt: skip
        assert config.data is not None
        self.data, self.view, self.rank, self.ranks = config.data, view, rank, ranks
        self.last = config.steps - 1
        self.failures = Failures(folder / "failures.jsonl", self.data.max_failed_share)
        self.samples = list(self._samples(lengths.clips, lengths.edits))
        videos = [self.pixel_frames(needed(b)) for stage in config.stages for b in stage.buckets if b.task != "image"]
        self.least = self.data.min_frames or min(videos, default=1)
        entries, self.measures = [], dict[int, Measure]()
        for index, measure in enumerate(self._measured()):
            sample = self.samples[index]
            self.failures.seen()
            if isinstance(measure, Measure):
                self.measures[index] = measure
                count = 1 + (measure.frames - 1) // self.view.step
                entries.append(Entry(sample.key, sample.captions, measure.aspect, count, sample.source is not None, row=index))
            else:
                self.failures.add(sample.key, *measure)
        self.failures.judge()
        if not entries:
            raise ValueError(f"data: not one of {len(self.samples)} clips can be used; see {self.failures.path}")
        self.planner = planner(config, entries, "data")
        self._pool = ThreadPoolExecutor(self.data.workers, "decode")
        self._ahead: dict[int, tuple[Plan, dict[int, Future[tuple[Entry, Piece]]]]] = {}

    def close(self) -> None:
        """Stop decoding ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def pixel_frames(self, latent_frames: int) -> int:
        return 1 + (latent_frames - 1) * self.view.step

    def taken(self, bucket: AnyBucket) -> int:
        """Frames that are taken of a clip for a bucket, if it has as many."""
        return self.pixel_frames(needed(bucket))

    def decoded(self, step: int) -> tuple[Plan, dict[int, tuple[Entry, Piece]]]:
        """The batch of a step, and this rank's clips by row; those of the steps after it are begun."""
        wanted = range(step, min(step + 1 + self.data.prefetch, max(self.last, step) + 1))
        for other in self._ahead.keys() - set(wanted):
            for future in self._ahead.pop(other)[1].values():
                future.cancel()
        for later in wanted:
            if later not in self._ahead:
                plan = self.planner.plan(later)
                own = range(self.rank, len(plan.draws), self.ranks)
                self._ahead[later] = plan, {row: self._pool.submit(self._piece, plan, row) for row in own}
        plan, futures = self._ahead.pop(step)
        return plan, {row: future.result() for row, future in futures.items()}

    def _samples(self, frames: int, edit_frames: int) -> Sequence[Sample]:
        sources = open_sources(self.data, frames, edit_frames)
        for place, source in enumerate(sources):
            if not source.lasting:
                if self.data.cache is None:
                    name = source.parts()[0].name
                    raise ValueError(
                        f"{name}: comes as a stream, of which training cannot take any clip at any time; run reelflow train prepare, "
                        "or name a folder for a copy with data.cache=…"
                    )
                sources[place] = copied(source, self.data.cache, self.data.caption, self.rank, self.ranks)
        joined = Joined(sources)
        return [sample for part in range(len(joined.parts())) for sample in joined.samples(part)]

    def _measured(self) -> list[Measure | tuple[str, str]]:
        """What can be taken of every sample, or reason and message; every rank looks at its share."""
        own = list(ahead(self._measure, self.samples[self.rank :: self.ranks], self.data.workers, 4 * self.data.workers))
        if self.ranks == 1:
            return own
        shares: list[list[Measure | tuple[str, str]]] = [[] for _ in range(self.ranks)]
        dist.all_gather_object(shares, own)
        return [shares[index % self.ranks][index // self.ranks] for index in range(len(self.samples))]

    def _measure(self, sample: Sample) -> Measure | tuple[str, str]:
        try:
            measure = self.view.measure(sample)
            self.view.require(sample, measure, self.least)
        except UnusableError as error:
            return error.reason, str(error)
        return measure

    def _piece(self, plan: Plan, row: int) -> tuple[Entry, Piece]:
        """The decoded clip of a row, or of the first that can stand in for it."""
        frames, least = self.taken(plan.bucket), self.pixel_frames(needed(plan.bucket))
        for entry, epoch in self.planner.draw(plan.bucket, plan.aspect, plan.draws[row]):
            try:
                return entry, self.view.take(self.samples[entry.row], self.measures[entry.row], frames, least, epoch)
            except UnusableError as error:
                self.failures.add(entry.key, error.reason, str(error))
        raise ValueError(f"data: none of the clips of aspect {plan.aspect} can be decoded; see {self.failures.path}")


class RawClips(Pieces):
    """Batches of a flow from the clips themselves. `source(step)` is a function of (seed, step) and the clips alone.

    Args and errors: as `Pieces`.
    """

    planner: PromptPlanner

    def __init__(self, config: TrainConfig, folder: Path, device: str | torch.device = "cpu", rank: int = 0, ranks: int = 1):
        self.config = config
        self.encoder = Encoder(config.vae, exact=config.precision == "float32", device=device)
        super().__init__(config, folder, *view_of(config, self.encoder), PromptPlanner, rank, ranks)

    def captions(self) -> list[str]:
        """Every caption, wrapped and with its prefixes."""
        return self.planner.captions()

    def with_texts(self, text: TextEncoder) -> TextEncoder:
        """The text encoder as it is: nothing was prepared."""
        return text

    def __call__(self, step: int) -> Batch:
        plan, found = self.decoded(step)
        ready = dict(zip(found, self._encoded(plan, list(found), [piece for _, piece in found.values()]), strict=True))

        def row_of(row: int) -> Tensor:
            if row not in ready:
                ready.update({row: self._encoded(plan, [row], [self._piece(plan, row)[1]])[0]})
            return ready[row]

        return plan.batch(Rows(row_of, len(plan.draws)))

    def _encoded(self, plan: Plan, rows: list[int], pieces: list[Piece]) -> list[Tensor]:
        """Rows (F, C, h, w)."""
        if not pieces:
            return []
        each, drop = len(pieces[0].frames), plan.bucket.task == "extend"
        found = self.encoder.posterior(torch.cat([torch.from_numpy(piece.frames) for piece in pieces]))
        mean, std = (values[:, int(drop) :].split(each) for values in found)
        sampled = self.data.posterior == "sample"
        return [finish(self.config, plan, row, mean[i], std[i] if sampled else None, drop) for i, row in enumerate(rows)]
