"""The sources that a configuration names, and copies of those that cannot be read in any order."""

from __future__ import annotations

import time
from hashlib import sha256
from pathlib import Path

from reelflow.adapters.checkpoint import written
from reelflow.data.config import DataConfig
from reelflow.data.folder import Folder
from reelflow.data.hub import Hub
from reelflow.data.rendered import Rendered
from reelflow.data.shards import Shards
from reelflow.data.source import Blob, Media, Member, Source, media_suffix


def open_sources(config: DataConfig, frames: int, edit_frames: int) -> list[Source]:
    """Those that the configuration names.

    Args:
        frames, edit_frames: of clips, and of each clip of an edit, where they are rendered.

    Raises:
        ValueError: a source that is not there, cannot be reached, is empty, or has no captions.
    """
    sources: list[Source] = [Folder(folder, config.caption) for folder in config.folder]
    if config.shards:
        sources.append(Shards(config.shards, config.caption))
    if config.hub:
        sources.append(Hub(config.hub, config.caption))
    if config.toybox:
        sources.append(Rendered(config.toybox, frames, edit_frames))
    return sources


def copied(source: Source, folder: Path, caption: str, rank: int = 0, ranks: int = 1) -> Source:
    """A copy on disk of a source that comes as a stream, as WebDataset shards, one per part; those that are there stay.

    Every rank copies its share, and waits for the others'.

    Raises:
        ValueError: a part that cannot be read, or no room.
    """
    names = [part.name for part in source.parts()]
    folder = folder / sha256("\n".join(names).encode()).hexdigest()[:16]
    files = [folder / f"{part:05d}.tar" for part in range(len(names))]
    for part in range(rank, len(names), ranks):
        if not files[part].exists():
            _copy(source, part, files[part], caption)
    while not all(file.exists() for file in files):
        time.sleep(1)
    return Shards([str(file) for file in files], caption)


def _copy(source: Source, part: int, file: Path, caption: str) -> None:
    from webdataset import TarWriter

    with written(file) as partial, TarWriter(str(partial)) as tar:
        for index, sample in enumerate(source.samples(part)):
            files = {suffix: data for suffix, data in (_file(sample.media), _file(sample.source, "source.")) if data is not None}
            tar.write({"__key__": f"{index:06d}", **files, "json": {caption: list(sample.captions)}})


def _file(media: Media | None, name: str = "") -> tuple[str, bytes | None]:
    """A file's name in a shard after the key, and its bytes."""
    if isinstance(media, Path):
        return f"{name}{media_suffix(media.name) or 'mp4'}", media.read_bytes()
    return (f"{name}{media.suffix or 'mp4'}", media.read()) if isinstance(media, Blob | Member) else (name, None)
