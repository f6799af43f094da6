"""`--lora` and `models merge`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reelflow.adapters.lora import DOWN, UP, save
from reelflow.clip import Clip

LAYER = "deep_block.layers.0.mlp.up"


@pytest.fixture
def heart(tmp_path: Path) -> Path:
    path = tmp_path / "heart.safetensors"
    about = {"rank": 2, "alpha": 2.0, "targets": [LAYER], "name": "heart", "model": "tiny", "revision": "1"}
    save(path, {LAYER + DOWN: torch.randn(2, 64), LAYER + UP: torch.randn(256, 2)}, about)
    return path


def test_a_lora_changes_the_clip_as_its_weight_says(run, tiny_model: Path, heart: Path, tmp_path: Path) -> None:
    def frames(name: str, *options: str) -> bytes:
        done = run("generate", "a red ball", "--model", tiny_model, "--seed", 0, "--frames", 1, "-o", f"{name}.png", "--json", *options)
        assert done.code == 0, done
        assert json.loads(done.out)["settings"].get("lora", []) == [
            {"file": "heart.safetensors", "weight": float(option.partition(":")[2] or 1)} for option in options if option != "--lora"
        ]
        return Clip.open(tmp_path / f"{name}.png").frames.tobytes()

    plain = frames("plain")
    assert frames("with", "--lora", "heart.safetensors") != plain
    assert frames("none", "--lora", "heart.safetensors:0") == plain
    merged = run("models", "merge", tiny_model, "heart.safetensors:0.5", "-o", "merged")
    assert (merged.code, merged.out) == (0, "merged: tiny-heart\n")
    half = run("generate", "a red ball", "--model", "merged", "--seed", 0, "--frames", 1, "-o", "half.png")
    assert half.code == 0
    assert Clip.open(tmp_path / "half.png").frames.tobytes() == frames("direct", "--lora", "heart.safetensors:0.5")


def test_a_lora_that_is_none_is_named(run, tiny_model: Path, heart: Path) -> None:
    done = run("generate", "a red ball", "--model", tiny_model, "--lora", "none.safetensors", "-o", "x.png", "--frames", 1)
    assert (done.code, len(done.errors)) == (2, 1)
    assert "none.safetensors: no such file" in done.errors[0]
    done = run("models", "merge", "mini", heart, "-o", "merged")
    assert (done.code, len(done.errors)) == (2, 1)
    assert "another architecture than mini" in done.errors[0]
    Path("whole.safetensors").touch()
    done = run("models", "merge", "whole.safetensors", heart, "-o", "merged")
    assert (done.code, len(done.errors)) == (2, 1)
    assert "whole.safetensors: a single file; adapters are merged into folders" in done.errors[0]
