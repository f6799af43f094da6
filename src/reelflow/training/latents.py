"""Render toybox and keep its latents: what the flow of `mini` is trained on.

    python -m reelflow.training.latents runs/latents --vae src/reelflow/weights/mini/vae --clips 4096 --workers 2

A shard is one safetensors file of samples of one kind and length:

    clips    `latents` (N, f, 48, h, w), f = 1 + (frames - 1) / 4
    edits    `source` and `target`, (N, f, 48, h, w) each

in bfloat16: posterior means, standardised with the mean and std of the VAE's config, not yet multiplied by the latent scale.
The header carries `kind`, `frames`, `seed`, `first` (index of the first sample) and `captions`, JSON: a list of true
phrasings for each sample. The VAE is causal, so the first latent frames of a clip are exactly the latents of its beginning:
a 33-frame sample also serves as 1, 5, 9 … frames. A shard follows from (seed, kind, frames, number); one that is there is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from reelflow.data.toybox import captions, edit_pair, render, sample_scene
from reelflow.training.one_pass import OnePass, channels_last
from reelflow.training.vae import to_pixels

SAMPLES = 64
"""Samples per shard of 33 frames; shorter clips make longer shards, so that every shard takes about as long."""


@dataclass(frozen=True)
class Shard:
    """Samples `first` to `first + count - 1` of a kind ("clips" or "edits") with `frames` frames each."""

    kind: str
    frames: int
    number: int

    @property
    def count(self) -> int:
        return SAMPLES * max(33 // self.frames, 1) // (2 if self.kind == "edits" else 1)

    @property
    def first(self) -> int:
        return self.number * self.count

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.frames:03d}-{self.number:05d}.safetensors"


class Encoder:
    """Standardised posterior means of a diffusers VAE folder; on the CPU in bfloat16 arithmetic unless `exact`."""

    def __init__(self, folder: str | Path, exact: bool = False, fused: bool = False) -> None:
        vae = AutoencoderKLWan.from_pretrained(str(folder)).float().eval().requires_grad_(False)
        channels_last(vae)
        self.model, self.exact = OnePass(vae, fused), exact
        self.mean, self.std = (torch.tensor(values).view(1, 1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))

    @torch.inference_mode()
    def __call__(self, frames: Tensor, piece: int = 4 * 33) -> Tensor:
        """uint8 (N, F, H, W, 3), F = 1 + 4n → float32 (N, 1 + n, 48, H/16, W/16); about `piece` frames at a time."""
        found = []
        for some in frames.split(max(piece // frames.shape[1], 1)):
            with torch.autocast("cpu", torch.bfloat16, enabled=not self.exact):
                found.append(self.model.encode(to_pixels(some)).float().chunk(2, 1)[0].transpose(1, 2))
        return (torch.cat(found) - self.mean) / self.std


def encode_shard(encoder: Encoder, shard: Shard, seed: int) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Tensors and captions of one shard."""
    indices = range(shard.first, shard.first + shard.count)
    if shard.kind == "edits":
        before, after, words = zip(*(edit_pair(seed, index) for index in indices), strict=True)
        tensors = {"source": encoder(render(before, shard.frames)), "target": encoder(render(after, shard.frames))}
        return tensors, [[text] for text in words]
    # Images and short clips show other scenes than the long ones.
    scenes = [sample_scene(seed + 1000 * shard.frames, index) for index in indices]
    return {"latents": encoder(render(scenes, shard.frames))}, [list(captions(scene)) for scene in scenes]


def write_shard(encoder: Encoder, shard: Shard, folder: Path, seed: int) -> None:
    """Encode and write one shard, under a temporary name first."""
    tensors, words = encode_shard(encoder, shard, seed)
    about = {"kind": shard.kind, "frames": shard.frames, "seed": seed, "first": shard.first}
    header = {key: str(value) for key, value in about.items()} | {"captions": json.dumps(words)}
    temporary = folder / f".{shard.name}.tmp"
    save_file({name: value.to(torch.bfloat16).contiguous() for name, value in tensors.items()}, temporary, header)
    temporary.replace(folder / shard.name)


def read_shard(path: str | Path) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Tensors (bfloat16) and captions of a shard."""
    with safe_open(str(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["captions"])  # noqa: SIM118


def plan(clips: Mapping[int, int], edits: Mapping[int, int]) -> list[Shard]:
    """The shards with at least so many samples per number of frames, kinds and lengths taking turns.

    Raises ValueError for a number of frames that is not 1 + 4n.
    """
    queues = []
    for kind, wanted in (("clips", clips), ("edits", edits)):
        for frames, count in wanted.items():
            if frames < 1 or (frames - 1) % 4:
                raise ValueError(f"{frames} frames: the VAE takes 1 + 4n, for example {1 + 4 * round((frames - 1) / 4)}")
            queues.append([Shard(kind, frames, number) for number in range(-(-count // Shard(kind, frames, 0).count))])
    order = [(place / len(queue), shard) for queue in queues for place, shard in enumerate(queue)]
    return [shard for _, shard in sorted(order, key=lambda entry: entry[0])]


def cache_latents(
    folder: str | Path,
    vae: str | Path,
    clips: Mapping[int, int],
    edits: Mapping[int, int] | None = None,
    seed: int = 0,
    worker: int = 0,
    workers: int = 1,
    fused: bool = False,
    minutes: float | None = None,
) -> Iterator[Path]:
    """Write the shards that are missing, and yield each as it is done.

    Args:
        folder: where the shards go; those that are there are kept.
        vae: a diffusers folder of `AutoencoderKLWan`.
        clips: number of samples by number of frames, such as {33: 4096, 1: 8192}.
        edits: number of edit pairs by number of frames.
        worker, workers: this process takes every `workers`-th shard from number `worker` on. Several processes of one
            thread each are faster than one of several threads.
        fused: compile the norms (a C++ compiler is needed); faster from a few hundred clips on.
        minutes: stop after so long, between two shards.
    """
    folder, start = Path(folder), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    todo = [shard for shard in plan(clips, edits or {})[worker::workers] if not (folder / shard.name).exists()]
    encoder = Encoder(vae, fused=fused)
    for shard in todo:
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            return
        write_shard(encoder, shard, folder, seed)
        yield folder / shard.name


def _work(worker: int, options: dict, shards: int) -> None:
    torch.set_num_threads(1)
    start = time.monotonic()
    for done, path in enumerate(cache_latents(worker=worker, **options), 1):
        pace = (time.monotonic() - start) / done
        sys.stderr.write(
            f"worker {worker}: {path.name}  {done}/{shards}  {pace:.1f} s per shard  {pace * (shards - done) / 60:.1f} min left\n"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Render toybox and keep its latents.")
    parser.add_argument("folder", type=Path, help="where the shards go; shards found there are kept")
    parser.add_argument("--vae", type=Path, required=True, help="diffusers folder of the VAE")
    parser.add_argument("--clips", type=int, default=4096, help="clips of 33 frames (default %(default)s)")
    parser.add_argument("--short", type=int, default=0, help="further clips of 9, and as many of 17 frames (default %(default)s)")
    parser.add_argument("--images", type=int, default=8192, help="single pictures (default %(default)s)")
    parser.add_argument("--edits", type=int, default=1024, help="edit pairs of 17 frames (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="series of scenes (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default %(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after so long (default: when all is done)")
    parser.add_argument("--no-fused", action="store_true", help="do without the compiled norms (no C++ compiler)")
    o = parser.parse_args()
    wanted = {frames: count for frames, count in ((33, o.clips), (1, o.images), (9, o.short), (17, o.short)) if count}
    edits = {17: o.edits} if o.edits else {}
    options = {"folder": o.folder, "vae": o.vae, "clips": wanted, "edits": edits, "seed": o.seed, "workers": o.workers}
    options |= {"fused": not o.no_fused, "minutes": o.minutes}
    torch.multiprocessing.spawn(_work, (options, -(-len(plan(wanted, edits)) // o.workers)), nprocs=o.workers)


if __name__ == "__main__":
    main()
