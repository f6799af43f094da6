"""Checkpoints: whole or not there, as many as asked for, and a full disk costs nothing but the newest."""

from __future__ import annotations

import json
import resource
import runpy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from reelflow.training.checkpoints import Checkpoints
from reelflow.training.parallel import Ranks

tiny = runpy.run_path(str(Path(__file__).with_name("tiny.py")))
CPU = Ranks(torch.device("cpu"))


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"weights": {"a": torch.full((300, 7), value), "b": torch.tensor(value)}, "run": {"rows": torch.zeros(0, 3)}}


def checkpoints(folder: Path, keep: int = 2, **about: Any) -> Checkpoints:
    return Checkpoints(folder, keep, CPU, about)


def read(found: Checkpoints) -> tuple[int, float]:
    path = found.find()
    assert path is not None
    into = state(-1.0)
    found.load(path, into)
    assert (into["weights"]["a"] == into["weights"]["b"]).all()
    return json.loads((path / "run.json").read_text())["step"], float(into["weights"]["b"])


@contextmanager
def no_file_above(most: int) -> Iterator[None]:
    """A disk that takes only so many bytes of a file: what the system does then is real."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_saved_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    """Also tensors without dimensions and without values; the copy is made before `save` returns."""
    found = checkpoints(tmp_path)
    for step in (5, 10, 15):
        values = state(float(step))
        found.save(step, values)
        values["weights"]["a"].zero_()
    found.close()
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000010", "step-00000015"]
    assert read(found) == (15, 15.0)
    assert found.sizes(tmp_path / "checkpoints" / "step-00000015")["run.rows"] == (0, 3)


def test_a_checkpoint_holds_tensors_and_json_only(tmp_path: Path) -> None:
    found = checkpoints(tmp_path)
    found.save(1, state(1.0))
    found.close()
    files = sorted((tmp_path / "checkpoints" / "step-00000001").iterdir())
    assert [path.suffix for path in files] == [".json", ".safetensors"]
    with safe_open(files[1], "pt") as file:
        assert set(file.keys()) == {"weights.a", "weights.b", "run.rows"}


def test_another_rank_may_make_the_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = shutil.rmtree

    def then_made_by_another(path: Path, ignore_errors: bool = False) -> None:
        remove(path, ignore_errors=ignore_errors)
        if path.name.startswith(".step-"):
            path.mkdir(parents=True)

    monkeypatch.setattr(shutil, "rmtree", then_made_by_another)
    found = checkpoints(tmp_path)
    found.save(1, state(1.0))
    found.close()
    assert found.failed is None
    assert read(found) == (1, 1.0)


def test_a_full_disk_leaves_the_one_before_and_says_so_in_one_line(tmp_path: Path) -> None:
    found = checkpoints(tmp_path)
    found.save(1, state(1.0))
    found.wait()
    with no_file_above(4096):
        found.save(2, state(2.0))
        with pytest.warns(UserWarning, match="could not be written") as said:
            found.wait()
    (line,) = (str(warning.message) for warning in said if "torch.distributed is disabled" not in str(warning.message))
    assert line.startswith("step 2: the checkpoint could not be written (")
    assert "that of step 1 stays good; free space under" in line
    assert "\n" not in line
    assert found.failed == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert read(found) == (1, 1.0)
    found.save(3, state(3.0))  # there is space again
    found.close()
    assert read(found) == (3, 3.0)


def test_a_run_whose_last_checkpoint_is_not_written_ends_with_an_error(tmp_path: Path) -> None:
    trainer, limit = tiny["make"](tmp_path, {"save_every": 4}), resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(row: dict[str, Any]) -> None:
        if row["step"] == 6:
            trainer.checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limit[1]))

    try:
        with pytest.warns(UserWarning, match="step 6: the checkpoint could not be written"), pytest.raises(ValueError, match="free space"):
            trainer.run(fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert tiny["make"](tmp_path).step == 4


def test_one_that_is_not_whole_is_passed_over(tmp_path: Path) -> None:
    found = checkpoints(tmp_path)
    for step in (1, 2):
        found.save(step, state(float(step)))
    found.close()
    (shard,) = (tmp_path / "checkpoints" / "step-00000002").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"step-00000002: not whole; going on from step-00000001"):
        assert read(checkpoints(tmp_path)) == (1, 1.0)
    (tmp_path / "checkpoints" / "step-00000001" / "run.json").unlink()
    with pytest.warns(UserWarning, match=r"step-00000002: not whole; beginning anew"):
        assert checkpoints(tmp_path).find() is None


def test_a_damaged_one_is_named(tmp_path: Path) -> None:
    found = checkpoints(tmp_path)
    found.save(1, state(1.0))
    found.close()
    (shard,) = (tmp_path / "checkpoints" / "step-00000001").glob("*.safetensors")
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"step-00000001: damaged \(.*\); remove it to go on from the one before"):
        found.sizes(shard.parent)


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-00000007").mkdir(parents=True)
    checkpoints(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_settings_that_have_to_be_the_same(tmp_path: Path) -> None:
    found = checkpoints(tmp_path, optimizer="adamw")
    found.save(1, state(1.0))
    found.close()
    with pytest.raises(ValueError, match=r"step-00000001: of a run with optimizer = adamw, now muon; give another folder or the same"):
        checkpoints(tmp_path, optimizer="muon").find()
