"""Batches for the flow from cached latents: tasks, prompts and shapes as the configuration's buckets say.

Shapes: B batch, F latent frames, C channels, h × w places.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reelflow.adapters.text import wrap_prompt
from reelflow.training.config import Bucket, TrainConfig
from reelflow.training.latents import read_shard

PREFIX = {"image": "", "generate": "", "extend": "(extend) ", "edit": "(v2v) "}


class Batch(NamedTuple):
    """Standardised, scaled latents (B, F, C, h, w) without noise, and their wrapped prompts."""

    latents: Tensor
    prompts: list[str]


class Samples(NamedTuple):
    """All cached samples of one kind and length; an edit holds its source and target as two tensors."""

    latents: tuple[Tensor, ...]
    captions: list[list[str]]


class CachedLatents:
    """`batch(step)` is a function of (seed, step) alone, whatever was asked before.

    Raises:
        ValueError: an empty folder, or a bucket for which the folder has no samples that long.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        found: dict[tuple[str, int], list[tuple[dict[str, Tensor], list[list[str]]]]] = defaultdict(list)
        for path in sorted(Path(config.latents).glob("*.safetensors")):
            tensors, captions = read_shard(path)
            kind = "edits" if "source" in tensors else "clips"
            found[kind, next(iter(tensors.values())).shape[1]].append((tensors, captions))
        if not found:
            raise ValueError(f"{config.latents}: no cached latents here; make them with: python -m reelflow.training.latents")
        self.samples = {}
        for (kind, frames), shards in found.items():
            names = ("source", "target") if kind == "edits" else ("latents",)
            latents = tuple(torch.cat([shard[0][name] for shard in shards]) for name in names)
            self.samples[kind, frames] = Samples(latents, [words for shard in shards for words in shard[1]])
        for stage in config.stages:
            for bucket in stage.buckets:
                self.serving(bucket)

    def captions(self) -> list[str]:
        """Every caption, wrapped and with its prefixes: what a tokenizer is fitted to."""
        words = {text for samples in self.samples.values() for phrasings in samples.captions for text in phrasings}
        return [self.wrap(PREFIX[task] + text, task) for text in sorted(words) for task in ("image", "extend", "edit")]

    def serving(self, bucket: Bucket) -> list[Samples]:
        """The samples that are long enough for a bucket; of images, every kind of clip's first frame."""
        kind = "edits" if bucket.task == "edit" else "clips"
        needed = bucket.frames + (bucket.task == "extend")
        usable = [samples for (own, frames), samples in sorted(self.samples.items()) if own == kind and frames >= needed]
        if not usable:
            raise ValueError(f"{self.config.latents}: no {kind} of {needed} latent frames for the bucket {bucket.task}; cache longer ones")
        return usable

    def __call__(self, step: int) -> Batch:
        rng = np.random.default_rng((self.config.seed, step))
        bucket = self._bucket(step, rng)
        usable = self.serving(bucket)
        sizes = np.array([len(samples.captions) for samples in usable])
        rows, prompts = [], []
        for source in rng.choice(len(usable), bucket.batch, p=sizes / sizes.sum()):
            samples = usable[source]
            row = int(rng.integers(len(samples.captions)))
            rows.append(self._take(samples, row, bucket, rng))
            phrasings = samples.captions[row]
            usual = min(2, len(phrasings)) if rng.random() < 0.75 else len(phrasings)  # the first ones are the canonical phrasings
            text = phrasings[int(rng.integers(usual))]
            text = "" if rng.random() < self.config.text_drop else PREFIX[bucket.task] + text
            prompts.append(self.wrap(text, bucket.task))
        return Batch(torch.stack(rows), prompts)

    def wrap(self, text: str, task: str) -> str:
        about = self.config.about
        noise = self.config.flow.noise_std if about.prompt.noise else None
        aspect = "1:1" if about.prompt.aspect else None
        return wrap_prompt(text, fps=about.fps if about.prompt.fps else None, image=task == "image", noise_std=noise, aspect=aspect)

    def _bucket(self, step: int, rng: np.random.Generator) -> Bucket:
        stage = self.config.stage(step)
        shares = np.array([bucket.share for bucket in stage.buckets])
        return stage.buckets[int(rng.choice(len(shares), p=shares / shares.sum()))]

    def _take(self, samples: Samples, row: int, bucket: Bucket, rng: np.random.Generator) -> Tensor:
        """One sample (F, C, h, w), frames after a clip's first one scaled."""
        parts = []
        for latents in samples.latents:
            start = int(rng.integers(1, latents.shape[1] - bucket.frames + 1)) if bucket.task == "extend" else 0
            part = latents[row, start : start + bucket.frames].float()
            part[0 if start else 1 :] *= self.config.about.latent_scale
            parts.append(part)
        return torch.cat(parts)
