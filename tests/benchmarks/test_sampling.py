"""The tables of docs/performance.md: measured parts between their marks, and what is measured."""

from __future__ import annotations

import sys
from pathlib import Path

import memory
import pytest
import scaling

import sampling
from reelflow.evaluation.bench import flow_pipeline

DOCUMENT = Path(__file__).parents[2] / "docs" / "performance.md"


def test_the_document_has_a_place_for_every_part(tmp_path: Path) -> None:
    text, copy = DOCUMENT.read_text(), tmp_path / "performance.md"
    for name in sampling.PARTS:
        copy.write_text(text)
        sampling.insert(copy, name, "measured anew")
        before, rest = text.split(f"<!-- begin {name} -->\n")
        after = rest.split(f"<!-- end {name} -->")[1]
        assert copy.read_text() == f"{before}<!-- begin {name} -->\nmeasured anew\n<!-- end {name} -->{after}"
    with pytest.raises(ValueError, match="has no part 'other'"):
        sampling.insert(copy, "other", "")


def test_unknown_parts_are_named() -> None:
    with pytest.raises(ValueError, match="--only rings: the parts are mini, large"):
        sampling.everything(1, None, ["rings"], print)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is what Linux says it is")
def test_memory_of_a_fresh_process(tiny_model: Path) -> None:
    found = memory.measure(model=str(tiny_model), sampler="published", latent_frames=2)
    assert 0 < found["sampling"] < found["whole"]


def test_longer_and_larger_clips(tiny_model: Path) -> None:
    pipe = flow_pipeline(str(tiny_model), "cpu")
    sizes = scaling.resolutions(pipe, 1, frames=1)
    assert [(row["height"], row["width"]) for row in sizes] == [(4, 4), (4, 8), (8, 8)]
    assert sizes[0]["passes"] < sizes[2]["passes"]
    found = scaling.ring(pipe, frames=5)
    distance = found["distance"]
    for mode in scaling.RINGS:
        assert distance[f"{mode} → {mode}"] < 2e-3
    assert distance["ring → windows of one frame"] > 10 * distance["windows → windows"]
    assert set(found["bits_per_dim"]) == set(scaling.RINGS)


@pytest.mark.slow
def test_thirty_seconds_against_five(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pipe = flow_pipeline(str(tiny_model), "cpu")
    found = scaling.lengths(pipe, str(tiny_model), 1, frames=(2, 3, 6))
    assert [(row["latent_frames"], row["mode"]) for row in found["rows"]] == [(f, m) for f in (2, 3, 6) for m in ("windows", "ring")]
    assert (found["short"], found["long"], set(found["ratios"])) == (3, 6, {"windows", "ring"})
    passes = {(row["mode"], row["latent_frames"]): row["passes"] for row in found["rows"]}
    assert all(passes[mode, 3] < passes[mode, 6] for mode in ("windows", "ring")), "more work, whatever the clock says"
    scaling.plot(tmp_path / "plot.png", found, scaling.resolutions(pipe, 1, frames=1), 8, 4)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "plot.png").stat().st_size < 100_000
