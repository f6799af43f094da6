"""The sampling benchmark: what it measures agrees with the samplers, and comes out as JSON and as a table."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from reelflow.evaluation.bench import COLUMNS, measure, run, table
from reelflow.evaluation.golden import load
from reelflow.sampling import Schedule, sample


@pytest.fixture(autouse=True)
def _one_thread(_seeded: None) -> None:
    """Networks so small that threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_tiny = runpy.run_path(str(Path(__file__).parents[1] / "pipelines" / "tiny.py"))["write_tiny"]
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


def test_a_model_folder_is_measured(tiny_model: Path) -> None:
    shares: list[float] = []
    found = run(
        str(tiny_model),
        "cpu",
        tolerances=(0.0, 1e-2),
        windows=(8,),
        published=(1e-8,),
        frames=5,
        repeats=2,
        progress=lambda _, share: shares.append(share),
    )
    assert json.loads(json.dumps(found)) == found
    assert found["latents"] == {"frames": 2, "height": 4, "width": 4, "tokens": 32}
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    slow, chunks, exact, fast = found["rows"]
    assert chunks["sampler"] == "fixed chunks"
    assert chunks["max_error"] < 1e-2, "the published algorithm, too, comes to the sequential answer if it is let"
    assert chunks["evaluations"]["deep"] == chunks["passes"]["deep"] * 16 / 32
    assert slow["passes"] == {"deep": 32, "shallow": 2 * 16}
    assert slow["evaluations"] == {"deep": 1.0, "shallow": 1.0}
    assert slow["rms_error"] == slow["max_error"] == slow["residual"] == 0
    assert exact["max_error"] < 1e-4
    assert fast["passes"]["deep"] < 32
    for row in found["rows"]:
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"])
        assert row["first_frame_seconds"] > 0
        assert row["peak_memory"] > 0
    words = table(found).splitlines()
    assert len(words) == 2 + 4
    assert all(column in words[1] for column in COLUMNS)
    assert words[2].split()[0] == "sequential"


@torch.no_grad()
def test_errors_are_against_sequential(golden: Path) -> None:
    flow, inputs = (found := load(golden / "starflow_image_mini")).model, found.inputs
    schedules = [Schedule("sequential"), Schedule(tolerance=1e-2)]
    row = measure(flow, inputs["noise"], inputs["text"], 0.0, schedules, repeats=1)[1]
    wanted, fast = (sample(flow, inputs["noise"], inputs["text"], schedule=schedule)[0] for schedule in schedules)
    assert row["max_error"] == pytest.approx(float((fast - wanted).abs().max()))
    assert row["rms_error"] == pytest.approx(float((fast - wanted).norm() / wanted.norm()))
    assert row["sampler"] == "jacobi"


def test_settings_that_are_not_usable(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="repeats 0"):
        run(str(tiny_model), repeats=0)
    with pytest.raises(ValueError, match="tolerance 2 is not usable"):
        run(str(tiny_model), tolerances=(2,))
    with pytest.raises(ValueError, match="frames 13: longer than the trained length of 9"):
        run(str(tiny_model), "cpu", frames=13)
