"""Where clips come from, whatever holds them: named parts of samples, each a clip with its captions.

A part is the unit that ranks share and that a stopped preparation goes on from. Its samples have a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from reelflow.data.scene import Scene

PART = 64
"""Samples of a part, where a source has no parts of its own."""
VIDEOS = ("mp4", "mov", "m4v", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "ogv", "flv", "gif")
PICTURES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "avif")


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar file: `size` bytes from `offset` on."""

    path: Path
    offset: int
    size: int
    suffix: str

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Blob:
    """A file in memory; `suffix` is what its name ended with."""

    data: bytes
    suffix: str

    def read(self) -> bytes:
        return self.data


Media = Path | Member | Blob | Scene


@dataclass(frozen=True)
class Sample:
    """A clip as its source has it, nothing decoded.

    key: names it, unique in its source. media: None where there is none. captions: several phrasings, canonical ones first; none
    where it has no caption. source: of an edit, the clip before. frames: how many to take, where not what the configuration says.
    """

    key: str
    media: Media | None
    captions: tuple[str, ...]
    source: Media | None = None
    frames: int | None = None


@dataclass(frozen=True)
class Part:
    """`count` samples (None: known once they are read); `name` changes if they do."""

    name: str
    count: int | None


class Source(Protocol):
    @property
    def lasting(self) -> bool:
        """Whether samples can be kept and read later, in any order: their media are not in memory."""

    def parts(self) -> Sequence[Part]:
        """The same at every call. Raises ValueError, in one line, where there is nothing or it cannot be reached."""

    def samples(self, part: int) -> Iterator[Sample]:
        """Those of a part, in their order. Raises ValueError where the part cannot be read."""


class Joined:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]):
        self._places = [(source, index, part) for source in sources for index, part in enumerate(source.parts())]

    def parts(self) -> list[Part]:
        return [part for _, _, part in self._places]

    def samples(self, part: int) -> Iterator[Sample]:
        source, index, _ = self._places[part]
        return source.samples(index)


def media_suffix(name: str) -> str | None:
    """The suffix of a video's or picture's name, in small letters without its dot; None of other files."""
    suffix = name.rpartition(".")[2].lower()
    return suffix if suffix in VIDEOS + PICTURES else None


def said(value: object) -> tuple[str, ...]:
    """The captions in a cell of metadata: a text or a list of texts, without empty ones."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(text.strip() for text in values if isinstance(text, str) and text.strip())
