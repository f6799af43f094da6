"""Prepared latents on disk: what `reelflow train prepare` writes and training reads.

A shard `00012-0003.safetensors` holds the usable ones of 64 samples of part 12 of the data, and says in its header (JSON, under
`reelflow`) what they are. Sample i has the tensor

    i.mean    (clips, f, C, h, w), clips = 1, or 2 of an edit: source and target
    i.std     the same, where latents are to be drawn from the posterior as mean + std · ε

in bfloat16: standardised as the VAE's config says, not yet multiplied by the latent scale. The VAE is causal, so the first
latent frames of a clip are exactly the latents of its beginning: a clip of 33 frames also serves as one of 1, 5, 9 … frames.
What is kept for Stable Video Diffusion, `svd.data` says.
`text.HASH` is what a text encoder makes of the prompt with that hash, (tokens, D), without padding.

Older shards (`clips-033-00000.safetensors`) are read too: `latents` (N, f, C, h, w), or `source` and `target` of edits, and
their `captions`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reelflow.adapters.checkpoint import written
from reelflow.training.config import RunConfig, TrainConfig

FORMAT = 1
SHARD = 64
"""Samples looked at for one shard."""
MANIFEST = "prepared.json"
SUMS = {"codec": "the codec was another", "clips": "the clips or captions were others"}
"""What is noted there by a checksum, and what a difference means."""
OPEN = 256
"""Shards kept open."""


@dataclass(frozen=True)
class Prepared:
    """A sample as it is written. more: further tensors, as they are."""

    key: str
    captions: tuple[str, ...]
    aspect: str
    mean: Tensor
    std: Tensor | None
    more: Mapping[str, Tensor] = field(default_factory=dict)


class Entry(NamedTuple):
    """A clip, or an edit, that batches are made of."""

    key: str
    captions: tuple[str, ...]
    aspect: str
    frames: int
    """Latent frames (of each clip of an edit)."""
    edit: bool
    file: Path | None = None
    row: int = 0


class Header(NamedTuple):
    """What a shard says of itself. last: it is the last one of its part."""

    last: bool
    failures: list[tuple[str, str, str]]
    samples: list[dict[str, Any]]


def shard_path(folder: Path, part: int, number: int) -> Path:
    return folder / f"{part:05d}-{number:04d}.safetensors"


def text_hash(prompt: str) -> str:
    return sha256(prompt.encode()).hexdigest()[:32]


def write_shard(
    path: Path, samples: Sequence[Prepared], last: bool, failures: Sequence[tuple[str, str, str]], texts: Mapping[str, Tensor]
) -> None:
    """Write under a temporary name, then rename. texts: states by prompt. Raises ValueError where there is no room."""
    tensors = {f"{index}.mean": sample.mean.to(torch.bfloat16).contiguous() for index, sample in enumerate(samples)}
    for index, sample in enumerate(samples):
        if sample.std is not None:
            tensors[f"{index}.std"] = sample.std.to(torch.bfloat16).contiguous()
        tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in sample.more.items()}
    tensors |= {f"text.{text_hash(prompt)}": states.contiguous() for prompt, states in texts.items()}
    about = [
        {"key": sample.key, "captions": sample.captions, "aspect": sample.aspect, "shape": list(sample.mean.shape)} for sample in samples
    ]
    header = {"format": FORMAT, "last": last, "failures": failures, "samples": about}
    for left in path.parent.glob(f".{path.name}.*.partial"):  # of a process that was killed
        left.unlink(missing_ok=True)
    try:
        with written(path) as partial:
            save_file(tensors, partial, {"reelflow": json.dumps(header, ensure_ascii=False)})
    except ValueError as error:
        raise ValueError(f"{error}; the shards before it stay good, and the same command goes on from there") from None


def read_header(path: Path) -> Header:
    """Raises ValueError for a file that is damaged or no shard."""
    try:
        found = json.loads((_opened(path).metadata() or {})["reelflow"])
        if found["format"] != FORMAT:
            raise ValueError(f"{path}: of format {found['format']}, this version reads {FORMAT}; prepare the data anew")
        return Header(found["last"], [tuple(row) for row in found["failures"]], found["samples"])
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path}: not a shard of prepared latents; remove it") from None


def finished(folder: Path, part: int) -> bool:
    """Whether all shards of a part are there."""
    shards = sorted(folder.glob(f"{part:05d}-*.safetensors"))
    return bool(shards) and len(shards) == int(shards[-1].stem[-4:]) + 1 and read_header(shards[-1]).last


def unfinished(folder: Path) -> int:
    """Parts of the data that are not all prepared; 0 also of a folder that does not say what is."""
    path = folder / MANIFEST
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else 0
    return sum(not finished(folder, part) for part in range(parts))


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), "pt")
    except FileNotFoundError:
        raise ValueError(f"{path}: is gone; prepare the data again") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged ({str(error).splitlines()[0][:100]}); remove it and run reelflow train prepare again") from None


class PreparedLatents:
    """All shards of a folder; tensors are read from disk when they are asked for.

    Raises:
        ValueError: nothing there, or a damaged shard.
    """

    def __init__(self, folder: Path):
        self.folder, self._file = folder, lru_cache(OPEN)(_opened)
        self.entries: list[Entry] = []
        self._texts: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = self._file(path)
            if "reelflow" in (file.metadata() or {}):
                rows = enumerate(read_header(path).samples)
                self.entries += [
                    Entry(row["key"], tuple(row["captions"]), row["aspect"], row["shape"][1], row["shape"][0] == 2, path, index)
                    for index, row in rows
                ]
                self._texts |= {name.removeprefix("text."): path for name in file.keys() if name.startswith("text.")}  # noqa: SIM118
            else:
                self.entries += _older(path, file)
        if not self.entries:
            raise ValueError(f"{folder}: no prepared latents here; make them with: reelflow train prepare CONFIG.yaml")

    def read(self, entry: Entry, start: int, frames: int) -> tuple[Tensor, Tensor | None]:
        """Means (clips, f, C, h, w) and standard deviations, float32, of some latent frames; without the latter where not kept."""
        assert entry.file is not None
        file, part, found = self._file(entry.file), slice(start, start + frames), []
        for name in (f"{entry.row}.mean", f"{entry.row}.std"):
            if name in file.keys():  # noqa: SIM118
                found.append(file.get_slice(name)[:, part].float())
        if found:
            return found[0], found[1] if len(found) > 1 else None
        names = ("source", "target") if entry.edit else ("latents",)
        return torch.cat([file.get_slice(name)[entry.row : entry.row + 1, part].float() for name in names]), None

    def tensor(self, entry: Entry, name: str) -> Tensor:
        """A further tensor of a clip, float32. Raises ValueError where it was not prepared."""
        assert entry.file is not None
        try:
            return self._file(entry.file).get_tensor(f"{entry.row}.{name}").float()
        except SafetensorError:
            raise ValueError(f"{entry.file}: was not prepared for this family of models; prepare the data anew in another folder") from None

    @property
    def has_texts(self) -> bool:
        return bool(self._texts)

    def text(self, prompt: str) -> Tensor | None:
        """The states (tokens, D) of a prompt, float32, without padding; None of one that was not prepared."""
        name = text_hash(prompt)
        path = self._texts.get(name)
        return None if path is None else self._file(path).get_tensor(f"text.{name}").float()


def _older(path: Path, file: Any) -> list[Entry]:
    """The samples of a shard of the first format, all of one kind and length."""
    try:
        captions = json.loads(file.metadata()["captions"])
        edit = "source" in file.keys()  # noqa: SIM118
        shape = file.get_slice("source" if edit else "latents").get_shape()
    except (KeyError, TypeError, ValueError, SafetensorError):
        raise ValueError(f"{path}: not a shard of prepared latents; remove it") from None
    return [Entry(f"{path.name}/{row}", tuple(words), "1:1", shape[1], edit, path, row) for row, words in enumerate(captions)]


def claim(folder: Path, config: RunConfig, seen: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Note in the folder what is prepared there, or compare with what was.

    Args:
        seen: what makes the model see clips as it does.

    Raises:
        ValueError: it holds latents of another codec, configuration or data.
    """
    assert config.data is not None
    data = config.data.model_dump(mode="json", exclude={"folder", "shards", "workers", "prefetch", "max_failed_share", "cache"})
    told = {**seen, **{f"data.{key}": value for key, value in data.items() if value is not None}}
    told |= {"about.frames": config.about.frames, "seed": config.seed, "precision": config.precision}
    told |= {"clips": sha256("\n".join(parts).encode()).hexdigest()[:16]}
    path = folder / MANIFEST
    if path.exists():
        _compare(folder, json.loads(json.dumps(told)), all_of_it=True)
        return
    if next(folder.glob("*.safetensors"), None):
        raise ValueError(f"{folder}: holds latents of an earlier version, which can be trained on; give another folder to prepare anew")
    with written(path) as partial:
        about = {"format": FORMAT, "parts": len(parts), "told": told}
        partial.write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def require_fit(folder: Path, seen: Mapping[str, Any]) -> None:
    """Raise ValueError where latents were prepared for another codec, size, rate or choice of aspects."""
    if (folder / MANIFEST).exists():
        _compare(folder, json.loads(json.dumps(seen)), all_of_it=False)


def seen_by(config: TrainConfig) -> dict[str, Any]:
    """What makes a flow see clips as it does."""
    about = config.about
    told = {"about.size": about.size, "about.fps": about.fps, "about.prompt.aspect": about.prompt.aspect}
    return told | {"codec": fingerprint(config.vae)}


def _compare(folder: Path, now: dict[str, Any], all_of_it: bool) -> None:
    before = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("told", {})
    for key in sorted(before.keys() | now.keys() if all_of_it else now.keys()):
        if before.get(key) != now.get(key):
            words = SUMS.get(key, f"then {key} = {before.get(key)}, now {now.get(key)}")
            raise ValueError(f"{folder}: holds latents that were prepared otherwise ({words}); give another folder, or remove it")


def fingerprint(vae: Path) -> str:
    """Of a codec: its configuration, and the size of its weights."""
    files = sorted(vae.glob("*.safetensors")) if vae.is_dir() else [vae]
    said = [(vae / "config.json").read_text(encoding="utf-8")] if vae.is_dir() else []
    return sha256("\n".join([*said, *(f"{file.name} {file.stat().st_size}" for file in files)]).encode()).hexdigest()[:16]
