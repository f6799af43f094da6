"""The script for one GPU does the same on a processor, at a small size: every part, saved at once, resumed by name."""

from __future__ import annotations

import json
from pathlib import Path

import h200
import phases
import pytest
import rig
import torch

from reelflow.flow import StarFlow


def call(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    monkeypatch.setattr("sys.argv", ["h200.py", *map(str, argv)])
    h200.main()


def test_parts_are_saved_and_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("rates", "build-bfloat16", "pass-bfloat16-4", "deep-bfloat16-8", "shallow-bfloat16", "denoiser-bfloat16", "vae-ours-float32")
    call(monkeypatch, tmp_path, "--tiny", "--device", "cpu", "--only", *few)
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found) == [*few[:2], "pass-bfloat16-4-graph", "pass-bfloat16-4-eager", *few[3:]]
    deep, shallow = found["deep-bfloat16-8"], found["shallow-bfloat16"]
    assert 1 < deep["evaluations"] < 12
    assert deep["passes"] < 2 * 12
    assert deep["floor"] == pytest.approx(deep["passes"] * deep["floor_ms_per_pass"] / 1e3)
    assert deep["seconds"] == pytest.approx(deep["passes"] * deep["ms_per_pass"] / 1e3)
    assert 0 < shallow["share_of_flops"] < 1
    assert found["vae-ours-float32"]["first_frame"] < found["vae-ours-float32"]["seconds"]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(found)
    capsys.readouterr()
    call(monkeypatch, tmp_path, "--tiny", "--device", "cpu", "--only", "rates", "shallow-b")
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "results.json").read_text()) == found
    call(monkeypatch, tmp_path, "--tiny", "--device", "cpu", "--only", "rates", "--again")
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["rates"] != found["rates"]
    (tmp_path / "results.json").write_text(json.dumps(again | {"rates": again["rates"] | {"latents": [21, 30, 53]}}))
    with pytest.raises(SystemExit, match="of another size"):
        call(monkeypatch, tmp_path, "--tiny", "--device", "cpu", "--only", "rates")


def test_a_part_that_fails_or_lacks_something_stops_no_other(tmp_path: Path) -> None:
    at = rig.Machine(rig.tiny(), tmp_path, torch.device("cpu"))

    def without(at: rig.Machine) -> dict[str, object]:
        raise rig.Missing("no diffusers")

    def broken(at: rig.Machine) -> dict[str, object]:
        raise RuntimeError("CUDA error: out of memory\nmore")

    assert h200.measured(at, without) == {"skipped": "no diffusers"}
    assert h200.measured(at, broken) == {"failed": "RuntimeError: CUDA error: out of memory"}


def test_the_full_size_is_the_published_one() -> None:
    with torch.device("meta"):
        model = StarFlow(rig.PUBLISHED)
    assert sum(weight.numel() for weight in model.parameters()) == 6_890_096_528
    assert rig.FULL.latents == (21, 30, 53)
    needs = phases.work(rig.PUBLISHED, model, 2 * 128, 16_695 + 256, "bfloat16")
    assert 1e3 * needs["floor"] == pytest.approx(6.2, abs=0.2), "the table of floors at 128 tokens and mean context"


def test_it_wants_a_gpu_for_the_full_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--tiny"):
        call(monkeypatch, tmp_path, "--device", "cpu")


@pytest.mark.slow
def test_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    call(monkeypatch, tmp_path, "--tiny", "--device", "cpu")
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found) == list(h200.parts(rig.tiny()))
    assert not [result for result in found.values() if "failed" in result]
    assert found["whole-bfloat16"]["residual_rms"] < 0.1
    assert found["published-float32"]["passes"] > 0
