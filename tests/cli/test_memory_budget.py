"""`--memory-budget` and `--precision`: what is said before a clip is made, what the file says after it, and what is refused."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

import reelflow
from reelflow import Clip

svd = runpy.run_path(str(Path(__file__).parent.parent / "pipelines" / "svd_tiny.py"))
FEW = ("--frames", 5, "--seed", 0)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_what_was_picked_is_said_and_stored(run, tiny_model: Path, tmp_path: Path) -> None:
    done = run("generate", "a red ball", "--model", tiny_model, "--memory-budget", "1GB", "-o", "a.png", "--frames", 1, "--seed", 0)
    assert done.code == 0
    (note,) = done.errors
    assert re.fullmatch(r"note: memory: float32; 7[0-9]{2}MB of 1GB", note)
    memory = Clip.open(tmp_path / "a.png").metadata["memory"]
    assert memory["budget"] == 10**9
    assert set(memory["counted"]) == {"text", "sample", "denoise", "decode"}
    assert max(memory["counted"].values()) < 10**9
    plan = {"precision": "float32", "layers": "device", "cache": "whole", "turns": False, "codec": "float32"}
    assert {name: memory[name] for name in plan} == plan


TASKS = {
    "stream": ["generate", "a red ball", "--frames", 5, "--stream"],
    "animate": ["animate", "VIDEO", "--frames", 5],
    "edit": ["edit", "VIDEO", "make it blue", "--max-frames", 5],
    "extend": ["extend", "VIDEO", "--seconds", 1.6],
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_counted_as_such(task: str, run, tiny_model: Path, video: Path, tmp_path: Path) -> None:
    words = [video if word == "VIDEO" else word for word in TASKS[task]]
    done = run(*words, "--model", tiny_model, "--memory-budget", "1GB", "--seed", 0, "-o", "a.mp4")
    assert done.code == 0, done
    assert sum("memory: float32; 7" in line for line in done.errors) == 1
    stages = {"text", "stream"} if task == "stream" else {"text", "encode", "sample", "denoise", "decode"}
    assert set(Clip.open(tmp_path / "a.mp4").metadata["memory"]["counted"]) == stages


BAD = {
    "no unit": ("24", "memory budget '24' is not usable", "24GB"),
    "wrong unit": ("24G", "memory budget '24G' is not usable", "24GB"),
    "negative": ("-1GB", "memory budget '-1GB' is not usable", "above 0"),
    "zero": ("0GB", "memory budget '0GB' is not usable", "above 0"),
    "no number": ("muchGB", "memory budget 'muchGB' is not usable", "above 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_budget_that_is_none_is_known_before_a_model_is_loaded(case: str, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(reelflow, "load", load, raising=False)
    budget, *words = BAD[case]
    done = run("generate", "a red ball", f"--memory-budget={budget}", "-o", "a.mp4")
    assert (done.code, done.out, len(done.errors)) == (2, "", 1)
    for word in words:
        assert word in done.errors[0]
    assert tree(tmp_path) == set()


def test_a_budget_that_nothing_fits_in(run, tiny_model: Path, tmp_path: Path) -> None:
    done = run("generate", "a red ball", "--model", tiny_model, "--memory-budget", "1MB", "-o", "a.mp4")
    assert (done.code, done.out, len(done.errors)) == (2, "", 1)
    assert "memory budget 1MB is too small: 9 frames of 64 × 64 with guidance needs at least 7" in done.errors[0]
    assert tree(tmp_path) == set()


def test_diffusion_refuses_other_precisions(run, tmp_path: Path) -> None:
    folder = svd["write_tiny"](tmp_path / "svd")
    torch.manual_seed(0)
    Clip(torch.randint(0, 255, (1, 64, 64, 3), dtype=torch.uint8).numpy(), 8).save(tmp_path / "a.png")
    before = tree(tmp_path)
    for precision in ("int8", "fp8"):
        done = run("animate", "a.png", "--model", folder, "--precision", precision, "-o", "b.mp4")
        assert (done.code, done.out, len(done.errors)) == (2, "", 1), done
        assert f"models of this family come in float32 and bfloat16, not in {precision}" in done.errors[0]
    assert tree(tmp_path) == before


def test_a_budget_of_diffusion(run, tmp_path: Path) -> None:
    """Said before, kept in the file after; one that is too small is told the least, and leaves nothing behind."""
    folder = svd["write_tiny"](tmp_path / "svd")
    Clip(torch.zeros((1, 64, 64, 3), dtype=torch.uint8).numpy(), 8).save(tmp_path / "a.png")
    words = ("animate", "a.png", "--model", folder, "--frames", 2, "--steps", 1, "--size", "64x64", "-o", "b.mp4")
    small = run(*words, "--memory-budget", "10MB")
    assert (small.code, small.out, len(small.errors)) == (2, "", 1), small
    assert "memory budget 10MB is too small: 2 frames of 64 × 64 with guidance need at least" in small.errors[0]
    assert not (tmp_path / "b.mp4").exists()
    done = run(*words, "--memory-budget", "8GB")
    assert done.code == 0, done
    assert done.errors[0].startswith("note: memory: float32; ")
    assert Clip.open(tmp_path / "b.mp4").metadata["memory"]["budget"] == 8 * 10**9


PRECISIONS = {"auto": "float32", "float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "fp8": "fp8"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision: str, run, tiny_model: Path, tmp_path: Path) -> None:
    done = run("generate", "a red ball", "--model", tiny_model, "--precision", precision, "-o", "a.gif", *FEW, "--json")
    assert (done.code, done.errors) == (0, [])
    said = json.loads(done.out)["settings"]
    assert said["precision"] == PRECISIONS[precision]
    assert said["tolerance"] == (1e-3 if said["precision"] == "float32" else 3e-2)


def test_precisions_that_cannot_be(run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*options: object) -> str:
        done = run("generate", "a red ball", "--model", tiny_model, "-o", "a.gif", *FEW, *options)
        assert (done.code, done.out, len(done.errors)) == (2, "", 1), done
        return done.errors[0]

    assert "'half'" in refused("--precision", "half")
    assert "int4 takes widths that are a multiple of 64, this model has layers of 32; use int8" in refused("--precision", "int4")
    assert "a multiple of 64" in refused("--precision", "int4", "--memory-budget", "8GB")
    monkeypatch.setattr("reelflow.adapters.precision.find_spec", lambda name: None)
    assert "precision int8 needs torchao; install it with: pip install 'reelflow[quantize]'" in refused("--precision", "int8")
    assert tree(tmp_path) == set()


def test_a_lora_goes_into_plain_layers_only(run, tiny_model: Path, tmp_path: Path) -> None:
    from reelflow.adapters.lora import DOWN, UP, save

    layer = "deep_block.layers.0.mlp.up"
    about = {"rank": 2, "alpha": 2.0, "targets": [layer], "name": "heart", "model": "tiny", "revision": "1"}
    save(tmp_path / "heart.safetensors", {layer + DOWN: torch.randn(2, 64), layer + UP: torch.randn(256, 2)}, about)
    common = ("generate", "a red ball", "--model", tiny_model, "--lora", "heart.safetensors", *FEW, "-o", "a.gif")
    done = run(*common, "--precision", "int8")
    assert (done.code, len(done.errors)) == (2, 1)
    assert "the layers are in int8" in done.errors[0]
    assert "reelflow models merge" in done.errors[0]
    assert not (tmp_path / "a.gif").exists()
    assert run(*common, "--memory-budget", "1GB").code == 0
