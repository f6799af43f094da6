"""WebDataset shards: tar files of clips and captions, read in place on disk, streamed from anywhere else.

Members that share a name up to the first dot are one sample: `000123.mp4` with `000123.txt` or `000123.json`; a
`000123.source.mp4` is the clip before an edit.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from glob import glob
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from reelflow.data.source import Blob, Media, Member, Part, Sample, media_suffix, said

REMOTE = {"http": "curl", "https": "curl", "s3": "aws", "gs": "gsutil", "hf": "curl"}
"""The program that streams each kind of URL."""
ENDS = (BrokenPipeError, EOFError, OSError, tarfile.TarError, ValueError)


class Shards:
    """The samples of tar files.

    Raises:
        ValueError: webdataset is not installed, no file is there, a shard cannot be reached, or is damaged.
    """

    def __init__(self, urls: Sequence[str], caption: str = "caption"):
        self.caption, self.urls = caption, [url for pattern in urls for url in _expanded(pattern)]
        if not self.urls:
            raise ValueError(f"{urls[0] if urls else 'no shard'}: no such shards; give tar files or URLs of them (data.shards)")
        self.lasting = all(_in_place(url) for url in self.urls)
        self._parts = [Part(*_facts(url)) for url in self.urls]

    def parts(self) -> list[Part]:
        return self._parts

    def samples(self, part: int) -> Iterator[Sample]:
        from webdataset.tariterators import group_by_keys

        url = self.urls[part]
        files = _members(url) if _in_place(url) else _stream(url)
        try:
            for found in group_by_keys(files):
                yield self._sample(f"{_name(url)}/{found['__key__']}", found)
        except ENDS as error:
            shown = url.split("?")[0]  # what follows may be a key
            raise ValueError(f"{shown}: the shard cannot be read ({_reason(error)}); see that it is there and whole") from None

    def _sample(self, key: str, found: dict[str, Any]) -> Sample:
        clips = {name: data for name, data in found.items() if not name.startswith("__") and media_suffix(f".{name}")}
        source = next((clips.pop(name) for name in list(clips) if name.startswith("source.")), None)
        captions = said(_text(found.get("txt", b""), key))
        if "json" in found:
            try:
                captions = said(json.loads(_text(found["json"], key)).get(self.caption)) or captions
            except (json.JSONDecodeError, AttributeError) as error:
                raise ValueError(f"{key}.json: not a JSON object ({error})") from None
        media = [_media(name, data) for name, data in clips.items()]
        return Sample(key, media[0] if media else None, captions, None if source is None else _media("source.mp4", source))


def _media(name: str, data: Any) -> Media:
    return data if isinstance(data, Member) else Blob(data, media_suffix(f".{name}") or "")


def _text(data: Any, key: str) -> str:
    try:
        return (data.read() if isinstance(data, Member) else data).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}: its text is not UTF-8 ({error.reason})") from None


def _expanded(pattern: str) -> list[str]:
    """Braces anywhere, `*` and `?` on disk."""
    try:
        from braceexpand import braceexpand
    except ImportError:
        raise ValueError("shards are read by webdataset, which is not installed: pip install 'reelflow[train]'") from None

    urls = [url.removeprefix("file://").removeprefix("file:") for url in braceexpand(pattern)]
    for url in urls:
        if "://" in url and urlparse(url).scheme not in REMOTE:
            raise ValueError(f"{url}: shards are files or URLs of {', '.join(REMOTE)}")
    return [file for url in urls for file in ([url] if "://" in url or not set(url) & set("*?") else sorted(glob(url)))]


def _in_place(url: str) -> bool:
    """Whether members can be read where they are: a tar file on disk, not compressed."""
    return "://" not in url and url.endswith(".tar")


def _facts(url: str) -> tuple[str, int | None]:
    """Name and number of samples, of a file on disk."""
    if "://" in url:
        return _name(url), None
    if not Path(url).is_file():
        raise ValueError(f"{url}: no such shard; give tar files or URLs of them (data.shards)")
    return f"{_name(url)} ({Path(url).stat().st_size} bytes)", None


def _name(url: str) -> str:
    """The same wherever the shards lie."""
    return "/".join(url.split("?")[0].rsplit("/", 2)[-2:])


def _members(url: str) -> Iterator[dict[str, Any]]:
    """Every file of a tar on disk by its place, nothing read but the headers."""
    with tarfile.open(url, "r:") as archive:
        for member in archive:
            if member.isreg() and not Path(member.name).name.startswith("."):
                where = Member(Path(url), member.offset_data, member.size, media_suffix(member.name) or "")
                yield {"fname": member.name, "data": where, "__url__": url}


def _stream(url: str) -> Iterator[dict[str, Any]]:
    """Every file of a tar, in memory, as it comes; an error of the transfer is raised also where the tar seems whole."""
    from webdataset.tariterators import tar_file_expander

    with closing(_opened(url)) as stream:
        yield from tar_file_expander([{"url": url, "stream": stream}], eof_value=None)
        while stream.read(1 << 20):  # padding after the end, or a program that still writes counts as failed
            pass


def _opened(url: str) -> Any:
    from webdataset.gopen import Pipe, gopen

    scheme = urlparse(url).scheme if "://" in url else ""
    try:
        if scheme == "s3":
            return Pipe(["aws", "s3", "cp", "--only-show-errors", url, "-"], mode="rb")
        return gopen(url) if scheme else Path(url).open("rb")
    except FileNotFoundError as error:
        raise ValueError(f"{scheme} is streamed by the program {REMOTE[scheme]}, which is not there") from error


def _reason(error: BaseException) -> str:
    """In one line, without the command that was run."""
    text = " ".join(str(error.args[0] if error.args else error).split()) or type(error).__name__
    return f"the transfer stopped with code {text.split('exit ')[1].split()[0]}" if "exit " in text else text[:200]
