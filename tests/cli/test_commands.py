"""Every command: what it writes, what it prints, its exit code."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import reelflow
from reelflow import Clip

SOURCE = Path(reelflow.__file__).parent.parent
QUICK = ("--guidance", 0, "--frames", 5)


def test_generate(run, tiny_model: Path, tmp_path: Path) -> None:
    done = run("generate", "A red ball, moving!", "--model", tiny_model, "--seed", 7, *QUICK)
    assert (done.code, done.errors) == (0, [])
    assert done.out.startswith("a-red-ball-moving-7.mp4: 5 frames × 64 × 64, 0.62 s at 8 per second · seed 7 · ")
    clip = Clip.open(tmp_path / "a-red-ball-moving-7.mp4")
    assert (len(clip), clip.metadata["seed"], clip.metadata["prompt"]) == (5, 7, "A red ball, moving!")
    assert clip.metadata["settings"]["guidance"] == 0


def test_a_default_name_never_overwrites(run, tiny_model: Path, tmp_path: Path) -> None:
    for _ in range(3):
        assert run("generate", "x", "--model", tiny_model, "--seed", 7, "--guidance", 0, "--frames", 1).code == 0
    assert sorted(os.listdir(tmp_path)) == ["x-7-1.mp4", "x-7-2.mp4", "x-7.mp4"]


def test_the_seed_is_drawn_printed_and_repeats_the_clip(run, tiny_model: Path, tmp_path: Path) -> None:
    done = run("generate", "x", "--model", tiny_model, "-o", "a.mp4", "--json", *QUICK)
    said = json.loads(done.out)
    assert done.out.count("\n") == 1
    assert {"file", "frames", "width", "height", "fps", "seconds", "seed", "model", "settings", "reports", "took"} <= said.keys()
    assert run("generate", "x", "--model", tiny_model, "-o", "b.mp4", "--seed", said["seed"], *QUICK).code == 0
    first, second = (Clip.open(tmp_path / name) for name in ("a.mp4", "b.mp4"))
    assert first.metadata["seed"] == said["seed"]
    assert np.array_equal(first.frames, second.frames)


def test_options_reach_the_sampler(run, tiny_model: Path, tmp_path: Path) -> None:
    options = (
        "--sampler",
        "sequential",
        "--tolerance",
        0.01,
        "--no-denoise",
        "--ring",
        "--precision",
        "bfloat16",
        "--device",
        "cpu",
        "--seconds",
        0.6,
        "--temperature",
        0.5,
    )
    said = json.loads(run("generate", "x", "--model", tiny_model, "-o", "a.gif", "--json", "--guidance", 2, *options).out)
    assert said["settings"] == {
        "frames": 5, "aspect": "1:1", "guidance": 2.0, "temperature": 0.5, "denoise": False, "ring": True, "sampler": "sequential",
        "tolerance": 0.01,
        "precision": "bfloat16",
    }  # fmt: skip
    assert said["reports"]["deep"]["passes"] == 32, "one pass a token"


def test_a_stream_is_written_as_it_comes(run, tiny_model: Path, tmp_path: Path) -> None:
    done = run("generate", "x", "--model", tiny_model, "-o", "a/", "--seed", 7, "--stream", *QUICK)
    assert (done.code, done.errors) == (0, [])
    assert done.out.startswith("a/: 5 frames × 64 × 64, 0.62 s at 8 per second · seed 7 · first frame after ")
    assert run("generate", "x", "--model", tiny_model, "-o", "b/", "--seed", 7, *QUICK).code == 0
    streamed, whole = (Clip.open(tmp_path / name) for name in ("a", "b"))
    assert np.abs(streamed.frames.astype(int) - whole.frames).max() <= 1
    assert streamed.metadata["seconds"]["first_frame"] > 0


def test_a_certificate_is_printed_and_stored(run, tiny_model: Path, tmp_path: Path) -> None:
    done = run("generate", "x", "--model", tiny_model, "-o", "a.mp4", "--seed", 7, "--certify", *QUICK)
    assert re.search(r"residual \S+ σ at most, \S+ σ rms", done.out)
    assert Clip.open(tmp_path / "a.mp4").metadata["certificate"]["largest"] < 0.05
    said = json.loads(run("generate", "x", "--model", tiny_model, "-o", "b.mp4", "--json", "--certify", *QUICK).out)
    assert 0 < said["certificate"]["rms"] <= said["certificate"]["largest"]


def test_no_metadata(run, tiny_model: Path, tmp_path: Path) -> None:
    assert run("generate", "x", "--model", tiny_model, "-o", "a.mp4", "--no-metadata", *QUICK).code == 0
    assert Clip.open(tmp_path / "a.mp4").metadata == {}


def test_folders_and_single_pictures(run, tiny_model: Path, tmp_path: Path) -> None:
    assert run("generate", "x", "--model", tiny_model, "-o", "frames/", *QUICK).code == 0
    assert len(list((tmp_path / "frames").glob("*.png"))) == 5
    assert run("generate", "x", "--model", tiny_model, "-o", "one.png", "--frames", 1, "--guidance", 0).code == 0
    assert Image.open(tmp_path / "one.png").size == (64, 64)


def test_animate(run, tiny_model: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (100, 70), (200, 30, 40, 128)).save(tmp_path / "photo.png")
    done = run("animate", "photo.png", "--model", tiny_model, "--seed", 1, *QUICK)
    assert (done.code, done.errors) == (0, [])
    assert len(Clip.open(tmp_path / "animated-photo-1.mp4")) == 5


def test_edit_says_what_it_leaves_out(run, tiny_model: Path, video: Path, tmp_path: Path) -> None:
    done = run("edit", video, "make it blue", "--model", tiny_model, "-o", "blue.webm", "--guidance", 0)
    assert (done.code, done.errors, len(Clip.open(tmp_path / "blue.webm"))) == (0, [], 9)
    long = Clip.open(video)
    (long + long).save(tmp_path / "long.mp4")
    done = run("edit", "long.mp4", "make it blue", "--model", tiny_model, "-o", "blue.mp4", "--guidance", 0)
    assert (done.code, done.errors) == (0, ["note: the video has 18 frames at 8 per second; the first 9 are used"])
    done = run(
        "edit", "long.mp4", "make it blue", "--model", tiny_model, "-o", "part.mp4", "--guidance", 0, "--start", 1, "--max-frames", 5
    )
    assert (done.code, done.errors, len(Clip.open(tmp_path / "part.mp4"))) == (0, [], 5)


def test_extend(run, tiny_model: Path, video: Path, tmp_path: Path) -> None:
    done = run("extend", video, "--seconds", 3, "--model", tiny_model, "-o", "long.mp4", "--guidance", 0)
    assert (done.code, done.errors) == (0, [])
    assert len(Clip.open(tmp_path / "long.mp4")) == 25


def test_score(run, tiny_model: Path, video: Path, tmp_path: Path) -> None:
    arguments = ("score", video, "a red ball", "--model", tiny_model)
    said = json.loads(run(*arguments, "--json", "--map", "surprise.mp4").out)
    assert sum(said["per_frame"]) == pytest.approx(said["log_prob"], rel=1e-5)
    assert said["bits_per_dim"] == pytest.approx(-said["log_prob"] / said["dims"] / math.log(2), rel=1e-5)
    assert np.shape(said["map"]) == (3, 4, 4)
    assert Clip.open(tmp_path / "surprise.mp4").frames.shape == (9, 64, 128, 3)
    done = run(*arguments)
    found = re.fullmatch(r"log p = (\S+) nats · (\S+) bits/dim of 384 dims.*\nnats per latent frame: (.*)\n", done.out)
    assert found, done.out
    assert float(found[1]) == pytest.approx(said["log_prob"], abs=0.01)
    assert [float(nats) for nats in found[3].split()] == pytest.approx(said["per_frame"], abs=0.1)


def test_encode_and_decode(run, tiny_model: Path, video: Path, tmp_path: Path) -> None:
    assert run("encode", video, "a red ball", "--model", tiny_model, "-o", "z.safetensors").code == 0
    done = run("decode", "z.safetensors", "--model", tiny_model, "-o", "again")
    assert (done.code, done.errors) == (0, [])
    pipe = reelflow.load(tiny_model, "cpu")
    latents = pipe.codec.encode(torch.from_numpy(Clip.open(video).frames.copy())[None])  # type: ignore[attr-defined]
    expected = pipe.codec.decode(latents)[0].numpy()  # type: ignore[attr-defined]
    again = Clip.open(tmp_path / "again")
    assert np.abs(again.frames.astype(int) - expected).max() <= 1
    assert again.metadata["settings"]["tolerance"] == 1e-6


def test_models(run, tiny_model: Path) -> None:
    done = run("models", "info", tiny_model, "--json")
    card = json.loads(done.out)
    parts = {"shallow_blocks.0", "shallow_blocks.1", "deep_block", "denoiser", "vae", "text_encoder", "total"}
    assert set(card["parameters"]) == parts
    pipe = reelflow.load(tiny_model, "cpu")
    assert card["parameters"]["deep_block"] == sum(p.numel() for p in pipe.flow.deep_block.parameters())  # type: ignore[attr-defined]
    assert card["parameters"]["total"] == sum(card["parameters"].values()) - card["parameters"]["total"]
    words = run("models", "info", tiny_model)
    assert "Untrained, for tests." in words.out
    assert f"{card['parameters']['deep_block']:,}" in words.out
    assert run("models", "list").code == 0
    assert isinstance(json.loads(run("models", "list", "--json").out), list)


def test_models_verify(run, golden: Path, tmp_path: Path) -> None:
    folder = golden / "starflow_image_mini"
    done = run("models", "verify", folder, "--json")
    rows = json.loads(done.out)
    assert (done.code, bool(rows), all(row["passed"] for row in rows)) == (0, True, True)
    weights = load_file(folder / "starflow_image_mini.safetensors")
    name = next(name for name in weights if name.startswith("out."))
    weights[name] += 1
    save_file(weights, tmp_path / "starflow_image_mini.safetensors")
    shutil.copy(folder / "starflow_image_mini.json", tmp_path)
    done = run("models", "verify", tmp_path)
    assert done.code == 1
    assert done.out.count("FAIL") == 1
    assert done.out.count("pass") == len(rows) - 1


def test_doctor(run) -> None:
    found = json.loads(run("doctor", "--json").out)
    assert found["libraries"]["torch"] == torch.__version__ or found["libraries"]["torch"] in torch.__version__
    assert found["encoders"][".mp4"] in ("libx264", "libopenh264")
    assert found["chosen"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    words = run("doctor")
    assert words.code == 0
    assert "processor" in words.out


def test_progress_is_shown_on_terminals_only(run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("generate", "x", "--model", tiny_model, "-o", "a.mp4", *QUICK)
    assert run(*arguments).errors == []
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = "\n".join(run(*arguments).errors)
    assert "writing" in shown or "decoding" in shown
    assert "%" in shown
    assert "0:00" in shown
    assert run(*arguments, "--quiet").errors == []
    assert run(*arguments, "--json").errors == [], "--json into a pipe"


def test_help_names_every_command_and_option(run) -> None:
    commands = "generate animate edit extend score encode decode train models doctor bench evaluate".split()
    done = run("--help")
    assert done.code == 0
    assert all(f" {command} " in done.out for command in commands)
    for command in ("generate", "animate", "edit", "extend", "score"):
        words = run(command, "--help").out
        for option in ("--model", "--seed", "--device", "--precision", "--sampler", "--tolerance", "--json", "--quiet"):
            assert option in words, (command, option)
    assert run("--version").out == f"reelflow {reelflow.__version__}\n"


def test_ctrl_c_leaves_no_file(tiny_model: Path, tmp_path: Path) -> None:
    """A real process; the note about the long prompt tells that sampling begins."""
    arguments = ["generate", "x" * 100, "--model", str(tiny_model), "-o", "long.mp4", "--seconds", "2000", "--sampler", "sequential"]
    command, environment = [sys.executable, "-m", "reelflow", *arguments], {**os.environ, "PYTHONPATH": str(SOURCE)}
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # where tests run in the background it is ignored, and that is inherited
    try:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            assert process.stderr is not None
            assert "longer than the 48 tokens" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=100)
        finally:
            process.kill()
    assert (process.returncode, out, errors) == (130, "", "interrupted: nothing was written\n")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_while_writing(run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reelflow.media.write import VideoSink

    written = VideoSink.write

    def interrupted(self: VideoSink, picture: np.ndarray) -> None:
        written(self, picture)
        if self.count == 3:
            assert os.listdir(tmp_path), "the temporary file"
            raise KeyboardInterrupt

    monkeypatch.setattr(VideoSink, "write", interrupted)
    done = run("generate", "x", "--model", tiny_model, "-o", "a.gif", *QUICK)
    assert (done.code, done.out, done.errors) == (130, "", ["interrupted: nothing was written"]), done.errors
    assert os.listdir(tmp_path) == []
