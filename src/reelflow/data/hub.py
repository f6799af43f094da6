"""Datasets of videos and pictures by Hugging Face's `datasets`, streamed; files are taken as they are and decoded here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reelflow.data.config import HubData
from reelflow.data.source import Blob, Media, Part, Sample, media_suffix, said

FAILS = (OSError, ValueError, RuntimeError, KeyError, TypeError)
"""What the library raises for a dataset that is not there, cannot be reached, or is not what its card says (ConnectionError too)."""


class Hub:
    """The rows of a dataset, shard by shard.

    Raises:
        ValueError: `datasets` is not installed, the dataset is not there or cannot be reached, or it has no such column.
    """

    lasting = False

    def __init__(self, config: HubData, caption: str = "caption"):
        try:
            import datasets
        except ImportError:
            raise ValueError("hub is read by datasets, which is not installed: pip install 'reelflow[train]'") from None

        self.config, self.caption = config, caption
        try:
            rows = datasets.load_dataset(config.name, config.subset, split=config.split, revision=config.revision, streaming=True)
            columns = list(rows.features or next(iter(rows.take(1)), {}))
        except FAILS as error:
            raise ValueError(f"{config.name}: the dataset cannot be read ({_reason(error)}); check name, split and network") from None
        kinds = {name: kind for name, kind in (rows.features or {}).items() if isinstance(kind, datasets.Video | datasets.Image)}
        self.media = config.media or (next(iter(kinds)) if len(kinds) == 1 else "")
        if self.media not in columns:
            raise ValueError(f"{config.name}: has the columns {', '.join(columns)}; say which one holds the clips (data.hub.media)")
        if caption not in columns:
            raise ValueError(f"{config.name}: has the columns {', '.join(columns)}; say which one holds the captions (data.caption)")
        for name, kind in kinds.items():
            rows = rows.cast_column(name, type(kind)(decode=False))
        self.rows = rows

    def parts(self) -> list[Part]:
        name = "/".join(filter(None, (self.config.name, self.config.subset, self.config.split, self.config.revision)))
        return [Part(f"{name} {index} of {self.rows.num_shards}", None) for index in range(self.rows.num_shards)]

    def samples(self, part: int) -> Iterator[Sample]:
        try:
            for index, row in enumerate(self.rows.shard(self.rows.num_shards, part)):
                yield Sample(f"{self.config.name}/{part}/{index}", _media(row[self.media]), said(row[self.caption]))
        except FAILS as error:
            raise ValueError(f"{self.config.name}: part {part} cannot be read ({_reason(error)}); check the network, then go on") from None


def _media(cell: Any) -> Media | None:
    """A cell: the bytes of a file, its path, or both."""
    if isinstance(cell, bytes):
        return Blob(cell, "")
    path = cell if isinstance(cell, str) else (cell or {}).get("path")
    data = cell.get("bytes") if isinstance(cell, dict) else None
    if data is not None:
        return Blob(data, media_suffix(path or "") or "")
    if path is None:
        return None
    if "://" not in path:
        return Path(path)
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return Blob(file.read(), media_suffix(path) or "")


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
