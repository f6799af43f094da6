"""The sampling benchmark: what it measures agrees with the samplers, and comes out as JSON and as a table."""

from __future__ import annotations

import json
import mmap
import runpy
import sys
from pathlib import Path

import pytest
import torch

from reelflow.evaluation.bench import COLUMNS, Case, Memory, measure, run, table
from reelflow.evaluation.golden import load
from reelflow.sampling import Schedule, sample


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_tiny = runpy.run_path(str(Path(__file__).parents[1] / "pipelines" / "tiny.py"))["write_tiny"]
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


def test_a_model_folder_is_measured(tiny_model: Path) -> None:
    shares: list[float] = []
    ours = (Schedule(tolerance=0.0, window=8), Schedule(tolerance=1e-2, window=8))
    found = run(
        str(tiny_model), "cpu", {"bfloat16": ours}, published=(1e-8,), frames=5, repeats=2,
        progress=lambda _, share: shares.append(share),
    )  # fmt: skip
    assert json.loads(json.dumps(found)) == found
    assert found["latents"] == {"frames": 2, "height": 4, "width": 4}
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    slow, published, rounded, chunks, exact, fast = found["rows"]
    names = [(row["sampler"], row["precision"]) for row in found["rows"]]
    assert names[:2] == [("sequential", "float32"), ("published", "float32")]
    kinds = ["sequential", "published, our engine", "jacobi", "jacobi"]
    assert names[2:] == [(kind, "bfloat16") for kind in kinds]
    assert slow["passes"] == rounded["passes"] == {"deep": 32, "shallow": 2 * 16}
    assert slow["evaluations"] == {"deep": 1.0, "shallow": 1.0}
    assert slow["rms_error"] == slow["max_error"] == slow["residual"] == 0
    assert rounded["max_error"] > 0
    for row in (chunks, exact):
        assert row["max_error"] < 2 * rounded["max_error"], "that of the precision is what is left"
    assert chunks["evaluations"]["deep"] == chunks["passes"]["deep"], "the clip is one chunk of 32 tokens"
    assert published["passes"]["deep"] < chunks["passes"]["deep"]
    assert fast["passes"]["deep"] < 32
    for row in found["rows"]:
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"])
        assert row["first_frame_seconds"] > 0
        assert row["cpu_seconds"] > 0
        assert row["peak_memory"] is None or row["peak_memory"] >= 0
    assert slow["times_faster"]["sequential"] == published["times_faster"]["published"] == 1
    words = table(found).splitlines()
    assert len(words) == 2 + len(found["rows"])
    assert all(column in words[1] for column in COLUMNS)
    assert words[2].split()[0] == "sequential"


@torch.no_grad()
def test_errors_are_against_sequential(golden: Path) -> None:
    flow, inputs = (found := load(golden / "starflow_image_mini")).model, found.inputs
    schedules = [Schedule("sequential"), Schedule(tolerance=1e-2)]
    cases = [Case(schedule, "float32") for schedule in schedules]
    row = measure({"float32": flow}, inputs["noise"], inputs["text"], 0.0, cases, repeats=1)[1]
    wanted, fast = (sample(flow, inputs["noise"], inputs["text"], schedule=schedule)[0] for schedule in schedules)
    assert row["max_error"] == pytest.approx(float((fast - wanted).abs().max()))
    assert row["rms_error"] == pytest.approx(float((fast - wanted).norm() / wanted.norm()))
    assert row["sampler"] == "jacobi"


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is what Linux says it is")
def test_memory_is_what_is_held_at_most() -> None:
    memory = Memory(torch.device("cpu"))
    held = mmap.mmap(-1, 64 << 20)  # not from what earlier tests left to the allocator
    torch.frombuffer(held, dtype=torch.uint8).fill_(1)
    del held
    assert 60 << 20 <= (memory.most() or 0) < 80 << 20
    assert (Memory(torch.device("cpu")).most() or 0) < 16 << 20, "the mark is set back"


def test_settings_that_are_not_usable(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="repeats 0"):
        run(str(tiny_model), repeats=0)
    with pytest.raises(ValueError, match="frames 13: longer than the trained length of 9"):
        run(str(tiny_model), "cpu", frames=13)
