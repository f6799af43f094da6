"""Clips that cannot be used: counted by reason, named, and too many of them stop the run."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from threading import Lock

JUDGED_FROM = 50
"""Clips after which the share of failures says something."""
NAMED = 3
"""Failures of each reason that a message names."""


class UnusableError(ValueError):
    """A clip that cannot be used. reason: one of a few, to count by; the message says the rest."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Failures:
    """The failures that one process sees, each clip once, as JSON lines (key, reason, message) in `path`, which is gone on with.

    Args:
        path: made with its folder at the first failure.
        most: share of all clips that may fail.
    """

    def __init__(self, path: Path, most: float):
        self.path, self.most, self.judged = path, most, 0
        self.counts: Counter[str] = Counter()
        self._counted: set[str] = set()
        self._lock = Lock()
        self._named: dict[str, list[str]] = defaultdict(list)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self._written = {row["key"] for row in map(_row, text.splitlines()) if row}
        self._begin = "\n" if text and not text.endswith("\n") else ""

    def seen(self, count: int = 1) -> None:
        """Count clips that were looked at, usable or not."""
        with self._lock:
            self.judged += count

    def add(self, key: str, reason: str, message: str) -> None:
        """Count a clip, which was seen, as failed. Raises ValueError where there are too many by now."""
        with self._lock:
            if key in self._counted:
                return
            self._counted.add(key)
            self.counts[reason] += 1
            if len(self._named[reason]) < NAMED:
                self._named[reason].append(key)
            if key not in self._written:
                self._write({"key": key, "reason": reason, "message": message})
        if self.judged >= JUDGED_FROM:
            self.judge()

    def _write(self, row: dict[str, str]) -> None:
        self._written.add(row["key"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:  # one write: lines of several processes do not mix
            file.write(self._begin + json.dumps(row, ensure_ascii=False) + "\n")
        self._begin = ""

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    def judge(self) -> None:
        """Raise ValueError where more than the allowed share failed."""
        if self.count > self.most * self.judged:
            share = f"more than max_failed_share = {self.most:g} allows"
            raise ValueError(f"{self} of {self.judged} clips cannot be used, {share}; every one is in {self.path}")

    def __str__(self) -> str:
        named = "; ".join(f"{count} {reason}: {_few(self._named[reason], count)}" for reason, count in self.counts.most_common())
        return f"{self.count} ({named})" if named else "0"


def _few(names: list[str], count: int) -> str:
    return ", ".join(names) + (", …" if count > len(names) else "")


def _row(line: str) -> dict[str, str] | None:
    """A line of the file; None for one that a process which was killed left half-written."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "key" in row else None
