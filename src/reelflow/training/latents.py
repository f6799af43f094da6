"""Prepare training data: decode every clip once, keep its latents, and what the text encoder makes of its caption.

    reelflow train prepare examples/mini.yaml
    torchrun --nproc-per-node 2 -m reelflow train prepare examples/mini.yaml     # the parts of the data are shared

Everything that is written follows from the data and the configuration: stopped at any time and started again, also with
another number of ranks, it goes on after the last whole shard, and the result is the same.

Legend: N clips, F frames, H × W pixels, f latent frames, h × w latent places, C latent channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from reelflow.adapters.hub import part_folder
from reelflow.adapters.text import TextEncoder, load_text_encoder
from reelflow.data.ahead import ahead
from reelflow.data.decode import Piece, View
from reelflow.data.failures import Failures, UnusableError
from reelflow.data.opening import open_sources
from reelflow.data.source import Joined, Member, Sample
from reelflow.training.batches import PREFIX, wrapped
from reelflow.training.config import TextConfig, TrainConfig
from reelflow.training.encoder import PIXELS, Encoder, Lengths, view_of
from reelflow.training.shards import SHARD, Header, Prepared, claim, finished, read_header, seen_by, shard_path, write_shard

if TYPE_CHECKING:
    from reelflow.training.svd.config import SvdConfig


class Item(NamedTuple):
    """A sample on its way into a shard; None where the shard ends, `last` if its part ends there too."""

    part: int
    number: int
    sample: Sample | None
    last: bool = False


def items(source: Joined, folder: Path, parts: range) -> Iterator[Item]:
    """The samples of all shards of these parts that are not there yet, each shard followed by its end."""
    for part in parts:
        if finished(folder, part):
            continue
        samples, number = source.samples(part), 0
        sample = next(samples, None)
        while True:
            there = shard_path(folder, part, number).exists()
            for _ in range(SHARD):
                if sample is None:
                    break
                if not there:
                    yield Item(part, number, sample)
                sample = next(samples, None)
            if not there:
                yield Item(part, number, None, sample is None)
            if sample is None:
                break
            number += 1


@dataclass
class Shard:
    """What has come of a shard so far."""

    samples: list[Prepared] = field(default_factory=list)
    failures: list[tuple[str, str, str]] = field(default_factory=list)


class Keeper(Protocol):
    """What a family of models keeps of clips."""

    @property
    def view(self) -> View:
        """How it sees them."""

    @property
    def lengths(self) -> Lengths:
        """How long they are prepared."""

    def seen(self) -> dict[str, Any]:
        """All that makes a model see clips as it does, JSON-able."""

    def encode(self, pieces: list[tuple[Sample, Piece]]) -> list[Prepared]:
        """Clips of one shape."""

    def states(self, samples: list[Prepared]) -> dict[str, Tensor]:
        """The text states of every prompt that training can ask for of these samples."""


class Preparation:
    """One process that prepares its share of the data.

    Raises:
        ValueError: a source, codec or text encoder that cannot be read or does not fit; a folder of other latents.
    """

    def __init__(self, config: TrainConfig | SvdConfig, device: str | torch.device = "cpu", rank: int = 0, ranks: int = 1):
        if config.data is None:
            raise ValueError("nothing to prepare; say under data where the clips are (folder, shards, hub or toybox)")
        if config.latents is None:
            raise ValueError("nowhere to put latents; name a folder with latents=…")
        self.data, self.folder = config.data, Path(config.latents)
        self.keeper = keeper(config, device)
        lengths = self.keeper.lengths
        self.source = Joined(open_sources(self.data, lengths.clips, lengths.edits))
        self.parts = self.source.parts()
        self.mine, self.first = range(rank, len(self.parts), ranks), rank == 0
        claim(self.folder, config, self.keeper.seen(), [part.name for part in self.parts])
        self.failures = Failures(self.folder / "failures.jsonl", self.data.max_failed_share)
        for header in self._headers(self.mine):
            self.failures.seen(len({sample["key"] for sample in header.samples}) + len(header.failures))
            for failure in header.failures:
                self.failures.add(*failure)

    def run(self, on_row: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
        """Write what is missing. Returns the last row: clips, failed, share done, seconds left.

        Args:
            on_row: called with such a row after every shard.

        Raises:
            ValueError: too many clips that cannot be used, a part that cannot be read, no room on the disk.
        """
        done = sum(finished(self.folder, part) for part in self.mine)
        began, before = time.monotonic(), done / max(1, len(self.mine))
        shard, row, seen = Shard(), self._row(before, None), None
        pieces: list[tuple[Sample, Piece]] = []
        work = ahead(self._decode, items(self.source, self.folder, self.mine), self.data.workers, 2 * self.data.workers)
        for item, found in work:
            if item.sample is not None:
                self.failures.seen()
                seen = item.sample
                if isinstance(found, UnusableError):
                    shard.failures.append((item.sample.key, found.reason, str(found)))
                    self.failures.add(*shard.failures[-1])
                    continue
                if pieces and (pieces[0][1].frames.shape != found[0].frames.shape or _pixels(pieces) >= PIXELS):
                    shard.samples += self._kept(pieces)
                    pieces = []
                pieces += [(item.sample, piece) for piece in found]
                continue
            shard.samples += self._kept(pieces)
            path = shard_path(self.folder, item.part, item.number)
            write_shard(path, shard.samples, item.last, shard.failures, self.keeper.states(shard.samples))
            shard, pieces, done = Shard(), [], done + item.last
            share = (done + (0.0 if item.last else self._inside(item, seen))) / len(self.mine)
            row = self._row(share, (time.monotonic() - began) * (1 - share) / (share - before) if share > before else None)
            on_row(row)
        self.failures.judge()
        return self._summary() if self.first else row

    def _row(self, share: float, left: float | None) -> dict[str, Any]:
        failed = self.failures.count
        seconds = None if left is None else round(left)
        return {"clips": self.failures.judged - failed, "failed": failed, "done": round(share, 4), "seconds_left": seconds}

    def _inside(self, item: Item, seen: Sample | None) -> float:
        """The share of a part that is done, where its length is known."""
        if count := self.parts[item.part].count:
            return (item.number + 1) * SHARD / count
        media = seen.media if seen else None
        return (media.offset + media.size) / media.path.stat().st_size if isinstance(media, Member) else 0.0

    def _headers(self, parts: Iterable[int]) -> list[Header]:
        return [read_header(path) for part in parts for path in sorted(self.folder.glob(f"{part:05d}-*.safetensors"))]

    def _decode(self, item: Item) -> tuple[Item, Any]:
        if item.sample is None:
            return item, None
        sample, lengths, view = item.sample, self.keeper.lengths, self.keeper.view
        frames = sample.frames or (lengths.edits if sample.source else lengths.clips)
        try:
            measure = view.measure(sample)
            least = min(lengths.least, frames)
            return item, [view.take(sample, measure, frames, least, epoch) for epoch in range(1 if measure.still else self.data.crops)]
        except UnusableError as error:
            return item, error

    def _kept(self, pieces: list[tuple[Sample, Piece]]) -> list[Prepared]:
        return self.keeper.encode(pieces) if pieces else []

    def _summary(self) -> dict[str, Any]:
        """Of all ranks' shards, once they are there."""
        while not all(finished(self.folder, part) for part in range(len(self.parts))):
            time.sleep(1)
        headers = self._headers(range(len(self.parts)))
        clips = sum(len({sample["key"] for sample in header.samples}) for header in headers)
        failed = sum(len(header.failures) for header in headers)
        if not clips:
            raise ValueError(f"{self.folder}: not one of {failed} clips can be used; see {self.failures.path}")
        return {"clips": clips, "failed": failed, "shards": len(headers), "done": 1.0, "seconds_left": 0}


class FlowKeeper:
    """Latents of clips, and what the text encoder makes of their captions."""

    def __init__(self, config: TrainConfig, device: str | torch.device):
        assert config.data is not None
        self.config, self.data = config, config.data
        self.encoder = Encoder(config.vae, exact=config.precision == "float32", device=device)
        self.view, self.lengths = view_of(config, self.encoder)
        self.text = _text_encoder(config, device) if self.data.text_states else None

    def seen(self) -> dict[str, Any]:
        config, told = self.config, seen_by(self.config)
        if self.text is not None:
            told |= {"text": str(config.text), "about.prompt": config.about.prompt.model_dump(), "flow.noise_std": config.flow.noise_std}
        return told

    def encode(self, pieces: list[tuple[Sample, Piece]]) -> list[Prepared]:
        """Both clips of an edit one after the other."""
        each = len(pieces[0][1].frames)
        mean, std = self.encoder.posterior(torch.cat([torch.from_numpy(piece.frames) for _, piece in pieces]))
        parts = zip(pieces, mean.split(each), std.split(each), strict=True)
        sampled = self.data.posterior == "sample"
        return [
            Prepared(sample.key, sample.captions, piece.aspect, mean, std if sampled else None) for (sample, piece), mean, std in parts
        ]

    def states(self, samples: list[Prepared]) -> dict[str, Tensor]:
        """The text states of every prompt that training can ask for of these samples."""
        if self.text is None:
            return {}
        tasks = sorted({bucket.task for stage in self.config.stages for bucket in stage.buckets})
        prompts = {
            wrapped(self.config, text, task, sample.aspect)
            for sample in samples for task in tasks for text in ("", *(PREFIX[task] + caption for caption in sample.captions))
        }  # fmt: skip
        found: dict[str, Tensor] = {}
        kind = torch.float32 if self.config.precision == "float32" else torch.bfloat16
        for start in range(0, len(prompts), 16):
            some = sorted(prompts)[start : start + 16]
            states = self.text.encode(some).states
            lengths = states.ne(0).any(-1).sum(1)  # padding is zero
            found |= {prompt: row[:length].to("cpu", kind) for prompt, row, length in zip(some, states, lengths.tolist(), strict=True)}
        return found

def keeper(config: TrainConfig | SvdConfig, device: str | torch.device) -> Keeper:
    """Of the configuration's family."""
    if isinstance(config, TrainConfig):
        return FlowKeeper(config, device)
    from reelflow.training.svd.data import SvdKeeper

    return SvdKeeper(config, device)


def prepare(
    config: TrainConfig | SvdConfig,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    device: str | torch.device = "cpu",
    rank: int = 0,
    ranks: int = 1,
) -> dict[str, Any]:
    """Prepare the data of a configuration, or this rank's share of it; see `Preparation.run`."""
    return Preparation(config, device, rank, ranks).run(on_row)


def _pixels(pieces: list[tuple[Sample, Piece]]) -> int:
    return sum(piece.frames[..., 0].size for _, piece in pieces)


def _text_encoder(config: TrainConfig, device: str | torch.device) -> TextEncoder:
    if isinstance(config.text, TextConfig) or config.train_text:
        raise ValueError("data.text_states needs a text encoder that stays as it is; give its folder for text, or leave text_states out")
    encoder, tokenizer = (part_folder(config.text, part, config.about.parts) for part in ("text_encoder", "tokenizer"))
    return load_text_encoder(encoder, tokenizer, config.flow.text_tokens, device)
