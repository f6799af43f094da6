"""Which clips make up the batch of a step: tasks, shapes, prompts and order, as a function of (seed, step) alone.

Every bucket goes through the clips that are long enough for it epoch by epoch, each in an order of its own; a batch has one
task, one length and one aspect.

Shapes: B batch, F latent frames, C channels, h × w places.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reelflow.adapters.text import TextEncoder, wrap_prompt
from reelflow.training.config import AnyBucket, Bucket, RunConfig, TrainConfig
from reelflow.training.shards import Entry, PreparedLatents, require_fit, seen_by

PREFIX = {"image": "", "generate": "", "extend": "(extend) ", "edit": "(v2v) "}


class Rows(Sequence[Tensor]):
    """The rows (F, C, h, w) of a batch, each made when it is asked for: of the batch, a rank reads its own rows."""

    def __init__(self, make: Callable[[int], Tensor], count: int):
        self._make, self._count = make, count

    def __getitem__(self, row: int) -> Tensor:  # type: ignore[override]
        if not 0 <= row < self._count:
            raise IndexError(row)
        return self._make(row)

    def __len__(self) -> int:
        return self._count

    def stack(self) -> Tensor:
        """All of them (B, F, C, h, w)."""
        return torch.stack(list(self))


class Batch(NamedTuple):
    """Standardised, scaled latents, rows of (F, C, h, w), without noise, and their wrapped prompts."""

    latents: Tensor | Rows
    prompts: list[str]
    learned_BF: Tensor | None = None
    """1 for the latent frames that count, 0 for the others; None: all of them count."""

    @property
    def size(self) -> int:
        return len(self.prompts)


class Plan(NamedTuple):
    """The batch of a step before anything is read."""

    step: int
    bucket: AnyBucket
    aspect: str
    draws: range
    """Numbers of its rows among all draws from the clips of this length and aspect."""
    prompts: list[str]
    starts: list[float]
    """Where rows of the task extend begin, and where those of drifted edits turn back, 0 … 1 of where they can."""

    @property
    def drifted(self) -> bool:
        return isinstance(self.bucket, Bucket) and self.bucket.drifted

    def astray(self, row: int) -> range:
        """Frames of a drifted edit's target that are not where they should be: from the second one up to one that is drawn."""
        return range(1, 1 + int(self.starts[row] * (self.bucket.frames - 1)))

    def batch(self, latents: Rows) -> Batch:
        if not self.drifted:
            return Batch(latents, self.prompts)
        target = range(self.bucket.frames)
        learned = [[0.0 for _ in target] + [float(frame not in self.astray(row)) for frame in target] for row in range(len(self.draws))]
        return Batch(latents, self.prompts, torch.tensor(learned))


def wrapped(config: TrainConfig, text: str, task: str, aspect: str) -> str:
    """A caption as the text encoder reads it; `text` has its task's prefix, or is empty."""
    wrap = config.about.prompt
    return wrap_prompt(
        text, fps=config.about.fps if wrap.fps else None, image=task == "image",
        noise_std=config.flow.noise_std if wrap.noise else None, aspect=aspect if wrap.aspect else None,
    )  # fmt: skip


def needed(bucket: AnyBucket) -> int:
    """Latent frames of a clip that serves a bucket."""
    return bucket.frames + (bucket.task == "extend")


class Planner:
    """`plan(step)`: the batch of a step, whatever was asked before.

    Raises:
        ValueError: a bucket for which no clip is long enough.
    """

    def __init__(self, config: RunConfig, entries: Sequence[Entry], where: object):
        self.entries, self._stage, self._seed = entries, config.stage, config.seed
        self._usable: dict[tuple[bool, int], dict[str, np.ndarray]] = {}
        self._starts: list[int] = []
        self._drawn: dict[tuple[bool, int, str], int] = defaultdict(int)
        for bucket in (bucket for stage in config.stages for bucket in stage.buckets):
            edit, least = key = bucket.task == "edit", needed(bucket)
            found: dict[str, list[int]] = defaultdict(list)
            for index, entry in enumerate(entries):
                if entry.edit == edit and entry.frames >= least:
                    found[entry.aspect].append(index)
            if not found:
                longest = max((entry.frames for entry in entries if entry.edit == edit), default=0)
                kind = "edits" if edit else "clips"
                words = f"the longest has {longest}" if longest else f"there are no {kind}"
                raise ValueError(f"{where}: no {kind} of {least} latent frames for the bucket {bucket.task}; {words}")
            self._usable[key] = {aspect: np.array(indices) for aspect, indices in sorted(found.items())}
        self._order = lru_cache(16)(self._new_order)

    def plan(self, step: int) -> Plan:
        while len(self._starts) <= step:  # where each bucket stands follows from the choices of all steps before
            bucket, aspect, _ = self._choose(len(self._starts))
            key = (bucket.task == "edit", needed(bucket), aspect)
            self._starts.append(self._drawn[key])
            self._drawn[key] += bucket.batch
        bucket, aspect, rng = self._choose(step)
        draws = range(self._starts[step], self._starts[step] + bucket.batch)
        return Plan(step, bucket, aspect, draws, *self.told(bucket, aspect, draws, rng))

    def told(self, bucket: AnyBucket, aspect: str, draws: range, rng: np.random.Generator) -> tuple[list[str], list[float]]:
        """Prompts and starts of the rows."""
        return [], rng.random(len(draws)).tolist()

    def draw(self, bucket: AnyBucket, aspect: str, draw: int) -> Iterator[tuple[Entry, int]]:
        """The clip of a draw and its epoch; after it those that stand in for it, where it turns out not to be usable."""
        key = (bucket.task == "edit", needed(bucket))
        indices = self._usable[key][aspect]
        epoch, place = divmod(draw, len(indices))
        order = self._order(*key, aspect, epoch)
        for other in range(len(indices)):
            yield self.entries[order[(place + other) % len(indices)]], epoch

    def _new_order(self, edit: bool, least: int, aspect: str, epoch: int) -> np.ndarray:
        across, down = map(int, aspect.split(":"))
        rng = np.random.default_rng((self._seed, epoch, edit, least, across, down))
        return rng.permutation(self._usable[edit, least][aspect])

    def _choose(self, step: int) -> tuple[AnyBucket, str, np.random.Generator]:
        """Bucket and aspect of a step, aspects as often as they have clips, and the generator for all that follows."""
        rng = np.random.default_rng((self._seed, step))
        buckets = self._stage(step).buckets
        shares = np.array([bucket.share for bucket in buckets])
        bucket = buckets[int(rng.choice(len(buckets), p=shares / shares.sum()))]
        usable = self._usable[bucket.task == "edit", needed(bucket)]
        sizes = np.array([len(indices) for indices in usable.values()])
        return bucket, list(usable)[int(rng.choice(len(sizes), p=sizes / sizes.sum()))], rng


class PromptPlanner(Planner):
    """With the prompts of a flow."""

    def __init__(self, config: TrainConfig, entries: Sequence[Entry], where: object):
        super().__init__(config, entries, where)
        self.config = config

    def told(self, bucket: AnyBucket, aspect: str, draws: range, rng: np.random.Generator) -> tuple[list[str], list[float]]:
        prompts, starts = [], []
        for draw in draws:
            phrasings = next(self.draw(bucket, aspect, draw))[0].captions
            usual = min(2, len(phrasings)) if rng.random() < 0.75 else len(phrasings)  # the first ones are the canonical phrasings
            text = phrasings[int(rng.integers(usual))]
            text = "" if rng.random() < self.config.text_drop else PREFIX[bucket.task] + text
            prompts.append(wrapped(self.config, text, bucket.task, aspect))
            starts.append(float(rng.random()))
        return prompts, starts

    def captions(self) -> list[str]:
        """Every caption, wrapped and with its prefixes: what a tokenizer is fitted to."""
        found = {(text, entry.aspect) for entry in self.entries for text in entry.captions}
        tasks = ("image", "extend", "edit")
        return [wrapped(self.config, PREFIX[task] + text, task, aspect) for text, aspect in sorted(found) for task in tasks]


def finish(config: TrainConfig, plan: Plan, row: int, mean: Tensor, std: Tensor | None, scaled_first: bool) -> Tensor:
    """One row (F, C, h, w) of a batch from its clips (clips, f, C, h, w): drawn from the posterior where it has a deviation, and
    scaled: frames after a clip's first one (also that one where it is not the first of its video). ValueError for a frame of more
    or fewer places than the flow's embedding has."""
    height, width = mean.shape[-2:]
    if config.flow.learned_places not in (None, height * width):
        raise ValueError(f"latents of {height} × {width} places, flow.learned_places is {config.flow.learned_places}; use that size")
    if std is not None:
        seed = np.random.SeedSequence((config.seed, plan.step, row, 1)).generate_state(1)[0]
        mean = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(int(seed)))
    latents = mean.clone()
    latents[:, 0 if scaled_first else 1 :] *= config.about.latent_scale
    if plan.drifted:
        pace = np.exp(np.random.default_rng((config.seed, plan.step, row, 2)).uniform(-1.0, 0.6))
        astray = np.array(plan.astray(row), int)
        latents[1, astray] = latents[1, np.rint(astray * pace).clip(1, plan.bucket.frames - 1).astype(int)]
    return latents.flatten(0, 1)


class CachedLatents:
    """Batches from prepared latents. `source(step)` is a function of (seed, step) alone, whatever was asked before.

    Raises:
        ValueError: nothing is prepared, it does not fit the model, or a bucket for which no clip is long enough.
    """

    def __init__(self, config: TrainConfig):
        assert config.latents is not None
        require_fit(Path(config.latents), seen_by(config))
        self.config, self.prepared = config, PreparedLatents(Path(config.latents))
        self.planner = PromptPlanner(config, self.prepared.entries, config.latents)
        first = self.prepared.entries[0]
        channels = self.prepared.read(first, 0, 1)[0].shape[2]
        if channels != config.flow.channels:
            raise ValueError(f"{config.latents}: latents of {channels} channels, flow.channels is {config.flow.channels}; use their codec")
        self.sampled = config.data.posterior == "sample" if config.data else self.prepared.read(first, 0, 1)[1] is not None

    def captions(self) -> list[str]:
        """Every caption, wrapped and with its prefixes."""
        return self.planner.captions()

    def with_texts(self, text: TextEncoder) -> TextEncoder:
        """The text encoder, or one that knows what was prepared, if text states were."""
        return PreparedText(text, self.prepared) if self.prepared.has_texts else text

    def close(self) -> None:
        """Nothing runs in the background."""

    def __call__(self, step: int) -> Batch:
        plan = self.planner.plan(step)
        return plan.batch(Rows(lambda row: self._row(plan, row), len(plan.draws)))

    def _row(self, plan: Plan, row: int) -> Tensor:
        entry, _ = next(self.planner.draw(plan.bucket, plan.aspect, plan.draws[row]))
        places = entry.frames - plan.bucket.frames  # where an extension can begin: anywhere but at the first latent frame
        start = 1 + int(plan.starts[row] * places) if plan.bucket.task == "extend" else 0
        mean, std = self.prepared.read(entry, start, plan.bucket.frames)
        if self.sampled and std is None:
            raise ValueError(f"{entry.file}: holds means without deviations; use data.posterior=mean, or prepare the data anew")
        return finish(self.config, plan, row, mean, std if self.sampled else None, start > 0)


class PreparedText(TextEncoder):
    """A text encoder that has been asked before: prompts it knows are read from disk, others computed."""

    def __init__(self, encoder: TextEncoder, prepared: PreparedLatents):
        super().__init__(encoder.model, encoder.tokenizer, encoder.tokens)
        self.prepared = prepared

    def states(self, prompts: list[str]) -> Tensor:
        known = [self.prepared.text(prompt) for prompt in prompts]
        new = [prompt for prompt, states in zip(prompts, known, strict=True) if states is None]
        computed = iter(super().states(new)) if new else iter(())
        device = next(self.model.parameters()).device
        padded = [
            next(computed) if states is None else torch.nn.functional.pad(states, (0, 0, 0, self.tokens - len(states))) for states in known
        ]
        return torch.stack([states.to(device, non_blocking=True) for states in padded])
