"""Folders of videos and pictures, captions beside them or in a table."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

from reelflow.data.source import PART, Part, Sample, media_suffix, said

TABLES = ("metadata.jsonl", "metadata.csv")


class Folder:
    """Every video and picture under a folder, in the order of their names.

    A caption is taken from a table (`metadata.jsonl` or `metadata.csv`, Hugging Face's convention: `file_name` is relative to the
    table; `source_file_name` names the clip before an edit) or from the `.txt` of the same name. Keys begin with the folder's own
    name, so that the same clips are the same data wherever they lie.

    Raises:
        ValueError: no such folder, nothing in it, no caption anywhere, or a table that cannot be read.
    """

    lasting = True

    def __init__(self, folder: Path, caption: str = "caption"):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give the folder of the videos (data.folder)")
        rows = {path: row for table in TABLES for found in sorted(folder.rglob(table)) for path, row in _table(found, caption)}
        sources = {row["source"] for row in rows.values() if row["source"]}
        files = {path for path in folder.rglob("*") if _is_clip(path, folder) and path not in sources} | rows.keys()
        self._samples = [_sample(path, folder, rows.get(path)) for path in sorted(files)]
        if not self._samples:
            raise ValueError(f"{folder}: no videos or pictures here; give the folder that holds them (data.folder)")
        if not any(sample.captions for sample in self._samples):
            raise ValueError(
                f"{folder}: {len(self._samples)} clips and no caption; put a .txt of the same name beside each, "
                f"or a metadata.jsonl with file_name and {caption}"
            )

    def parts(self) -> list[Part]:
        starts = range(0, len(self._samples), PART)
        groups = [self._samples[start : start + PART] for start in starts]
        return [Part(f"{group[0].key} … {group[-1].key} ({_checksum(group):08x})", len(group)) for group in groups]

    def samples(self, part: int) -> Iterator[Sample]:
        return iter(self._samples[part * PART : (part + 1) * PART])


def _checksum(samples: list[Sample]) -> int:
    """Changes with a name or a caption."""
    return crc32("\n".join(f"{sample.key}\t{sample.captions}\t{sample.source is None}" for sample in samples).encode())


def _is_clip(path: Path, folder: Path) -> bool:
    hidden = any(name.startswith(".") for name in path.relative_to(folder).parts)
    return not hidden and media_suffix(path.name) is not None and path.is_file()


def _sample(path: Path, folder: Path, row: dict[str, Any] | None) -> Sample:
    key = f"{folder.absolute().name}/{Path(os.path.relpath(path, folder)).as_posix()}"
    captions = row["captions"] if row else ()
    beside = path.with_suffix(".txt")
    if not captions and beside.is_file():
        try:
            captions = said(beside.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{beside}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    return Sample(key, path, captions, row["source"] if row else None)


def _table(path: Path, caption: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Clip and captions of every row of a table. Raises ValueError naming the file, the line and the column."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); save it as UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = _json_lines(path, text) if path.suffix == ".jsonl" else ((reader.line_num, row) for row in reader)
    for line, row in rows:
        for column in ("file_name", caption):
            if column not in row:
                has = ", ".join(map(str, row))
                hint = "" if column == "file_name" else "; name the caption's column: data.caption=…"
                raise ValueError(f"{path} line {line}: no column {column!r} (it has {has}){hint}")
        source = row.get("source_file_name")
        yield path.parent / row["file_name"], {"captions": said(row[caption]), "source": path.parent / source if source else None}


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, words in enumerate(text.splitlines(), 1):
        if words.strip():
            try:
                row = json.loads(words)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {line}: not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {line}: {words[:40]!r} is not a row; write {{\"file_name\": …, …}}")
            yield line, row
