"""The training configuration and what is written about it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reelflow.training.config import Bucket, LoraConfig, Stage, TextConfig, TrainConfig, load
from reelflow.training.svd.config import SvdConfig

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


def test_every_key_of_svd_is_explained() -> None:
    words = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = words.partition("| key of svd |")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines() if row.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(names for names, _ in rows))) == set(SvdConfig.model_fields)
    checked = 0
    for names, defaults in rows:
        for name, said in zip(re.findall(r"`(\w+)`", names), defaults.split(", "), strict=False):
            own = SvdConfig.model_fields[name].default
            if said.strip() and isinstance(own, int | float):
                assert float(said) == own, name
                checked += 1
    assert checked == 9


def test_examples_are_of_their_family(tmp_path: Path) -> None:
    assert isinstance(load(ROOT / "examples" / "mini.yaml"), TrainConfig)
    found = load(ROOT / "examples" / "mini_svd.yaml", ["seed=3"])
    assert isinstance(found, SvdConfig)
    assert (found.seed, found.about.frames, max(bucket.frames for stage in found.stages for bucket in stage.buckets)) == (3, 25, 25)
    with pytest.raises(ValueError, match=r"mini_svd\.yaml: drop = 2"):
        load(ROOT / "examples" / "mini_svd.yaml", ["drop=2"])
