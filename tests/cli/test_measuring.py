"""train, bench, evaluate: commands that take long, at their shortest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import reelflow


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Path:
    """A run of four steps on cached latents of noise."""
    (tmp_path / "latents").mkdir()
    captions = json.dumps([["a red ball moves right"]] * 8)
    about = {"kind": "clips", "frames": "5", "seed": "0", "first": "0", "captions": captions}
    latents = {"latents": torch.randn(8, 2, 8, 4, 4).bfloat16(), "last": torch.randn(8, 8, 4, 4).bfloat16()}
    save_file(latents, tmp_path / "latents" / "clips-005-00000.safetensors", about)
    values = {
        "about": json.loads((tiny_model / "config.json").read_text()) | {"name": "trained", "tasks": ["generate"]},
        "flow": json.loads((tiny_model / "transformer" / "config.json").read_text()),
        "latents": str(tmp_path / "latents"),
        "vae": str(tiny_model / "vae"),
        "text": {"width": 16, "layers": 1, "heads": 2, "vocabulary": 300},
        "stages": [{"steps": 4, "buckets": [{"task": "generate", "frames": 2, "batch": 2}]}],
        "precision": "float32", "log_every": 2, "save_every": 2, "warmup": 1,
    }  # fmt: skip
    path = tmp_path / "first.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_train_makes_a_model_and_goes_on_where_it_was(run, config: Path, tmp_path: Path) -> None:
    done = run("train", config, "lr=1e-3", "seed=3")
    assert done.code == 0, done
    assert [line.split(" · ")[0] for line in done.errors if line.startswith("step")] == ["step 2/4", "step 4/4"]
    assert all(word in done.errors[0] for word in ("loss", "bits/dim", "gradient", "tokens/s", "left"))
    assert done.out.startswith("runs/first/model: 4 steps · loss ")
    clip = reelflow.load(tmp_path / "runs" / "first" / "model", "cpu").generate("a red ball moves right", seed=0, frames=5)
    assert clip.frames.shape == (5, 64, 64, 3)
    again = run("train", config, "seed=3", "--json", "--folder", "runs/first")
    assert again.code == 0
    assert json.loads(again.out)["model"] == "runs/first/model"


def test_train_names_what_is_wrong(run, config: Path) -> None:
    for change, words in (
        ("latents=nowhere", "nowhere: no prepared latents here"),
        ("lr=-1", "lr = -1"),
        ("learning_rate=1", "learning_rate"),
        ("flow.text_dim=32", "flow.text_dim = 32"),
    ):
        done = run("train", config, change, "--folder", "run")
        assert (done.code, len(done.errors)) == (2, 1), done
        assert words in done.errors[0]
    done = run("train", config, "--folder", "/proc/run")
    assert (done.code, len(done.errors)) == (2, 1), done


def test_ctrl_c_while_training_names_what_there_is(run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reelflow.training.trainer import Trainer

    step = Trainer.train_step

    def interrupted(self: Trainer) -> dict[str, float]:
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    done = run("train", config, "--quiet")
    assert (done.code, done.out) == (130, "")
    assert done.errors == ["interrupted: runs/first holds the last checkpoint; the same command goes on from there"]
    monkeypatch.undo()


def test_bench(run, tiny_model: Path) -> None:
    done = run("bench", "--model", tiny_model, "--frames", 1, "--repeats", 1, "--json")
    found = json.loads(done.out)
    assert (done.code, done.errors) == (0, [])
    assert {"sequential", "published", "published, our engine", "jacobi"} == {row["sampler"] for row in found["rows"]}
    assert {"tokens_per_second", "passes", "first_frame_seconds", "peak_memory"} <= found["rows"][0].keys()


def test_bench_profile(run, tiny_model: Path) -> None:
    done = run("bench", "--model", tiny_model, "--frames", 1, "--repeats", 1, "--profile")
    assert (done.code, done.errors) == (0, [])
    phases = ["text", "deep", "shallow", "denoiser", "decoder", "writing"]
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == ["phase", *phases, "all"]


def test_evaluate_needs_a_model(run) -> None:
    done = run("evaluate", "toybox", "--model", "maxi")
    assert (done.code, len(done.errors)) == (2, 1)
    assert "'maxi': unknown model" in done.errors[0]


def test_bench_train(run, config: Path) -> None:
    done = run("bench", "train", config, "optimizer=muon", "latents=nowhere", "--steps", 1, "--json")
    assert (done.code, done.errors) == (0, []), done
    found = json.loads(done.out)
    assert [row["loop"] for row in found["rows"]] == ["plain PyTorch, AdamW", "reelflow, adamw", "reelflow, muon"]
    for row in found["rows"]:
        assert row.keys() >= {"seconds", "cpu_seconds", "times_plain", "tokens_per_second", "mfu", "peak_memory"}
        assert row["mfu"] > 0
    assert found["tokens"] == 2 * 2 * 4 * 4
    assert [row["frames"] for row in found["memory"]] == [1, 2]
    words = run("bench", "train", config, "--steps", 1)
    assert "trained, " in words.out
    assert "memory of one clip's step by its latent frames:" in words.out
