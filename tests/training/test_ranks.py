"""Runs of several ranks, sharded or not, killed or not: the same batches, the same losses, nothing lost."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.timeout(900)  # processes wait for each other, on a busy machine for long
SCRIPT = Path(__file__).with_name("tiny.py")
tiny = runpy.run_path(str(SCRIPT))


class Ended(NamedTuple):
    code: int
    errors: str


def start(folder: Path, *jobs: str, ranks: int = 2, kill: str = "") -> list[Ended]:
    """Run jobs as `ranks` processes, as torchrun would; how each ended."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "REELFLOW_KILL": kill}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", SCRIPT, folder, *jobs],
            env={**os.environ, **shared, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    return [Ended(process.returncode, errors) for process in processes for errors in [process.communicate(timeout=800)[1]]]


def curve(folder: Path) -> list[dict[str, Any]]:
    """Steps and losses of a run's log, without what the clock says."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "loss", "bits_per_dim", "score_loss", "grad_norm", "skipped")} for row in rows]


def same(found: Path, wanted: Path, tolerance: float) -> None:
    """Equal steps, losses and gradient norms to a relative tolerance."""
    first, second = curve(found), curve(wanted)
    assert [row["step"] for row in first] == [row["step"] for row in second] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "score_loss", "grad_norm"):
        assert [row[key] for row in first] == pytest.approx([row[key] for row in second], rel=tolerance, abs=3e-5), (found.name, key)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process comes to."""
    folder = tmp_path_factory.mktemp("alone")
    tiny["write_base"](folder)
    for name in ("alone", "parts", "muon", "8 bits", "wide", "adapters", "foresight", "antithetic"):
        tiny["job"](name, folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks come to."""
    folder = tmp_path_factory.mktemp("pair")
    tiny["write_base"](folder)
    kinds = ("muon", "8 bits", "adapters", "foresight", "antithetic")
    jobs = ("alone", "sharded", "offloaded", "bfloat16", "muon", *(f"sharded {kind}" for kind in kinds), "not finite")
    for rank in start(folder, *jobs):
        assert rank.code == 0, rank.errors
    return folder


def test_parts_of_a_batch_are_the_same_step(alone: Path) -> None:
    same(alone / "parts", alone / "alone", 1e-4)


@pytest.mark.parametrize("job", ["alone", "sharded", "offloaded"])
def test_two_ranks_are_as_one(alone: Path, pair: Path, job: str) -> None:
    """A batch of 5 rows on two ranks: means are weighted by rows; shards, parts and recomputation change nothing."""
    same(pair / job, alone / "alone", 1e-4)


def test_muon_on_two_ranks_is_as_on_one(alone: Path, pair: Path) -> None:
    """Its orthogonalisation is in bfloat16, where batches of other sizes may round otherwise."""
    for job in ("muon", "sharded muon"):
        same(pair / job, alone / "muon", 2e-2)


def test_adamw_in_8_bits_is_close_to_adamw_also_sharded(alone: Path, pair: Path) -> None:
    same(alone / "8 bits", alone / "wide", 1e-2)
    same(pair / "sharded 8 bits", alone / "8 bits", 1e-2)
    assert curve(alone / "8 bits") != curve(alone / "wide")


def test_adapters_beside_sharded_weights(alone: Path, pair: Path) -> None:
    same(pair / "sharded adapters", alone / "adapters", 1e-4)
    assert all(".lora_" in name for name in load_file(pair / "sharded adapters" / "weights.safetensors"))


def test_foresight_on_two_ranks_is_as_on_one(alone: Path, pair: Path) -> None:
    """Its pass over sharded layers, then the usual one of a stage without it."""
    same(pair / "sharded foresight", alone / "foresight", 1e-4)
    assert curve(alone / "foresight")[1] != curve(alone / "alone")[1]


def test_antithetic_rows_on_two_ranks_are_as_on_one(alone: Path, pair: Path) -> None:
    same(pair / "sharded antithetic", alone / "antithetic", 1e-4)
    assert curve(alone / "antithetic")[1] != curve(alone / "alone")[1]


def test_sharded_bfloat16_is_close(alone: Path, pair: Path) -> None:
    same(pair / "bfloat16", alone / "alone", 0.1)
    weights = load_file(pair / "bfloat16" / "weights.safetensors")
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())  # the masters are float32


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(pair: Path) -> None:
    for rank in range(2):
        words, step, unchanged = json.loads((pair / "not finite" / f"{rank}.json").read_text())
        assert words.startswith("step 3: loss nan")
        assert (step, unchanged) == (3, True)


def test_a_killed_run_goes_on_bit_by_bit(alone: Path, tmp_path: Path) -> None:
    """Killed while its second checkpoint gets its name; started again, it writes the log of a run that never stopped."""
    assert start(tmp_path, "alone", ranks=1, kill="0 write")[0].code == -9
    assert [path.name for path in (tmp_path / "alone" / "checkpoints").iterdir()] == [".step-00000002"]
    tiny["job"]("alone", tmp_path)
    assert curve(tmp_path / "alone") == curve(alone / "alone")
    first, second = (load_file(folder / "alone" / "weights.safetensors") for folder in (tmp_path, alone))
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.slow
def test_a_lost_rank_ends_the_others_and_nothing_is_lost(pair: Path, tmp_path: Path) -> None:
    survivor, killed = start(tmp_path, "sharded", kill="1 5")
    assert (survivor.code, killed.code) == (1, -9)
    line = next(line for line in survivor.errors.splitlines() if line.startswith("LostRankError"))
    assert line.startswith("LostRankError: another process of this run is gone or does not answer (")
    assert line.endswith(("; the same command goes on from step 2", "step 4"))  # that of step 4 may not have been whole yet
    for rank in start(tmp_path, "sharded"):
        assert rank.code == 0, rank.errors
    assert curve(tmp_path / "sharded") == curve(pair / "sharded")
    first, second = (load_file(folder / "sharded" / "weights.safetensors") for folder in (tmp_path, pair))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_another_number_of_ranks_goes_on_from_a_checkpoint(pair: Path, alone: Path, tmp_path: Path) -> None:
    """Sharded over two, read by one: the same weights and state, then the same losses to rounding."""
    checkpoints = tmp_path / "alone" / "checkpoints"
    checkpoints.mkdir(parents=True)
    source = pair / "sharded" / "checkpoints" / "step-00000004"
    assert json.loads((source / "run.json").read_text())["ranks"] == 2
    (checkpoints / source.name).symlink_to(source)
    log = (pair / "sharded" / "log.jsonl").read_text()
    (tmp_path / "alone" / "log.jsonl").write_text(log + '{"step": 7, "lo')  # and a line cut off while it was written
    tiny["job"]("alone", tmp_path)
    assert curve(tmp_path / "alone")[:4] == curve(pair / "sharded")[:4]
    same(tmp_path / "alone", alone / "alone", 1e-4)
