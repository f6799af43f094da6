"""The training configuration and what is written about it."""

from __future__ import annotations

import re
from pathlib import Path

from reelflow.training.config import Bucket, LoraConfig, Stage, TextConfig, TrainConfig

ROOT = Path(__file__).parents[2]


def test_every_key_is_explained() -> None:
    """And none that does not exist: the first column of the table of docs/training.md."""
    words = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = words.partition("## Every key")[2].partition("\n## ")[0]
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(first))) == set(TrainConfig.model_fields)
    for inner in (Bucket, LoraConfig, Stage, TextConfig):
        for key in inner.model_fields:
            assert re.search(rf"[{{ ,`]{key}[}},: `]", table), f"{inner.__name__}.{key}"


def test_defaults_are_as_explained() -> None:
    words = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1:3] for row in words.partition("## Every key")[2].partition("\n## ")[0].splitlines() if row.startswith("| `")]
    checked = 0
    for names, defaults in rows:
        for name, said in zip(re.findall(r"`(\w+)`", names), defaults.split(", "), strict=False):
            own = TrainConfig.model_fields[name].default
            if said.strip() and isinstance(own, bool | int | float | str):
                assert said.strip() == str(own).lower() or float(said) == own, name
                checked += 1
    assert checked > 20
