"""The published reference's numbers, and what `verify` says of folders that hold something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reelflow.evaluation import golden as vectors
from reelflow.evaluation.golden import verify

IMAGE = "starflow_image_mini"


@pytest.mark.parametrize("name", [IMAGE, "starflow_v_mini"])
def test_every_golden_vector_holds(golden: Path, name: str) -> None:
    rows = verify(golden / name)
    failed = [row for row in rows if not row.passed]
    assert not failed
    outputs = {key.removeprefix("out.") for key in load_file(golden / name / f"{name}.safetensors") if key.startswith("out.")}
    assert {row.name.split(" ")[0] for row in rows} == outputs
    assert sum(row.name.startswith("sample") for row in rows) == 2 * sum(key.startswith("sample") for key in outputs)


@pytest.fixture
def copied(golden: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden / IMAGE, tmp_path / IMAGE))


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a golden set (`.` written as `__`), or drop those that are None."""
    path = folder / f"{IMAGE}.safetensors"
    tensors = load_file(path) | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


def test_a_wrong_number_fails_its_row_alone(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "SAMPLERS", {})
    wrong = load_file(copied / f"{IMAGE}.safetensors")["out.z"]
    wrong[0, 0, 0, 0] += 1e-3
    change(copied, out__z=wrong)
    assert [row.name for row in verify(copied) if not row.passed] == ["z"]


def test_folders_that_are_none(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no golden vectors here; expected NAME\.json"):
        verify(tmp_path)
    change(copied, out__surprise=torch.zeros(1))
    with pytest.raises(ValueError, match=r"out\.surprise has no comparison"):
        verify(copied)
    change(copied, out__surprise=None, in__text_null=None, out__sample=None)
    with pytest.raises(ValueError, match="'text_null' is missing"):
        verify(copied)
    change(copied, model__blocks__0__sos_embed=None)
    with pytest.raises(ValueError, match=r"1 missing \(shallow_blocks\.0\.sos\)"):
        verify(copied)
    (copied / f"{IMAGE}.json").write_text(json.dumps({"kind": "image"}), encoding="utf-8")
    with pytest.raises(ValueError, match="not a description of golden vectors"):
        verify(copied)
