"""Bad input: exit code 2, one line that names the value and the remedy, no file left."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reelflow
from reelflow import Clip


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def files(tmp_path: Path, video: Path) -> None:
    """Files of every kind of trouble, in the folder where the commands run."""
    shutil.copyfile(video, tmp_path / "good.mp4")
    Clip.open(video)[:1].save(tmp_path / "good.png")
    (tmp_path / "notes.png").write_text("not a picture")
    whole = video.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "empty.mp4").write_bytes(b"")
    with av.open(str(tmp_path / "noframes.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64  # type: ignore[union-attr]
        container.start_encoding()
    Clip(np.zeros((9, 1, 1, 3), np.uint8), 8).save(tmp_path / "dot.gif")
    (tmp_path / "run.yaml").write_text("lr: 1\nlearning_rate: 3\n")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    save_file({"w": torch.zeros(2)}, tmp_path / "weights.safetensors")


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


BAD = {
    "empty prompt": (["generate", "  "], "the prompt ' ' is empty", "say what the video should show"),
    "empty instruction": (["edit", "good.mp4", ""], "the prompt '' is empty", "say what should change"),
    "no picture": (["animate", "notes.png"], "notes.png", "neither a picture nor a video", "make or download it again"),
    "truncated video": (["edit", "cut.mp4", "make it blue"], "cut.mp4", "cut off", "make or download it again"),
    "empty file": (["score", "empty.mp4"], "empty.mp4", "0 bytes", "make or download it again"),
    "zero frames": (["score", "noframes.mkv"], "noframes.mkv", "make or download it again"),
    "one pixel": (["score", "dot.gif"], "1 × 1 pixels", "at least 16 × 16"),
    "missing picture": (["animate", "none.png"], "none.png does not exist", "check the name"),
    "missing video": (["extend", "none.mp4", "--seconds", "3"], "none.mp4 does not exist", "check the name"),
    "missing encoding": (["decode", "none.safetensors"], "none.safetensors does not exist", "reelflow encode"),
    "no encoding": (["decode", "weights.safetensors"], "weights.safetensors: not an encoding", "reelflow encode"),
    "missing folder": (["generate", "x", "-o", "nowhere/a.mp4"], "nowhere/a.mp4", "make it first"),
    "folder is a file": (["generate", "x", "-o", "good.png/a.mp4"], "good.png/a.mp4", "make it first"),
    "folder without permission": (["generate", "x", "-o", "/proc/a.mp4"], "/proc/a.mp4 cannot be written", "choose another folder"),
    "encoding without permission": (["encode", "good.mp4", "-o", "/proc/z.safetensors"], "/proc/z.safetensors", "choose another folder"),
    "map without permission": (["score", "good.mp4", "--map", "/proc/m.mp4"], "/proc/m.mp4", "choose another folder"),
    "extension": (["generate", "x", "-o", "a.xyz"], "a.xyz", ".xyz is not known", ".mp4, .webm, .gif"),
    "extension of an encoding": (["encode", "good.mp4", "-o", "z.mp4"], "z.mp4", "ends with .safetensors"),
    "one picture for many frames": (["generate", "x", "-o", "a.png"], "a.png holds one frame", "--frames 1"),
    "unknown model": (["generate", "x", "--model", "maxi"], "'maxi': unknown model", "give a packaged name"),
    "checkpoint file as model": (["generate", "x", "--model", "evil.pth"], "evil.pth: cannot be read", "holds more than tensors"),
    "pickle that is not weights": (["models", "convert", "evil.pth", "--config", "run.yaml", "-o", "m"], "evil.pth: cannot be read"),
    "frames": (["generate", "x", "--frames", "10"], "frames = 10", "nearest: 9 or 13"),
    "frames below one": (["generate", "x", "--frames", "0"], "frames 0 is not usable", "give 1"),
    "aspect": (["generate", "x", "--aspect", "16:9"], "'16:9'", "use 1:1"),
    "zero seconds": (["generate", "x", "--seconds", "0"], "seconds 0", "above 0"),
    "negative seconds": (["extend", "good.mp4", "--seconds", "-3"], "seconds -3", "above 0"),
    "seconds that are no number": (["animate", "good.png", "--seconds", "nan"], "seconds nan", "above 0"),
    "too many seconds": (["generate", "x", "--seconds", "1e12"], "1e+12", "over the limit of 3600"),
    "seconds and frames": (["generate", "x", "--seconds", "1", "--frames", "9"], "seconds 1 and frames 9", "give one"),
    "seconds it has": (["extend", "good.mp4", "--seconds", "0.5"], "1.12 s long already", "more than that"),
    "guidance": (["generate", "x", "--guidance", "nan"], "guidance nan", "give a number ≥ 0"),
    "negative guidance": (["generate", "x", "--guidance", "-1"], "guidance -1", "give a number ≥ 0"),
    "temperature": (["generate", "x", "--temperature", "2"], "temperature 2", "from 0 to 1"),
    "tolerance": (["generate", "x", "--tolerance", "5"], "tolerance 5", "from 0 (exact) to 0.1"),
    "tolerance that is no number": (["score", "good.mp4", "--tolerance", "nan"], "tolerance nan", "from 0"),
    "seed": (["generate", "x", "--seed", "-1"], "seed -1", "give a whole number from 0"),
    "device": (["generate", "x", "--device", "quantum"], "'quantum'", "use cpu"),
    "sampler": (["generate", "x", "--sampler", "newton"], "newton", "generate --help"),
    "no such option": (["generate", "x", "--speed", "9"], "--speed", "generate --help"),
    "no prompt": (["generate"], "PROMPT", "generate --help"),
    "no such command": (["create", "x"], "create", "reelflow --help"),
    "start": (["score", "good.mp4", "--start", "nan"], "start is nan", "0 or more"),
    "start beyond the end": (["score", "good.mp4", "--start", "60"], "good.mp4", "use a smaller start"),
    "part": (["score", "good.mp4", "--max-frames", "0"], "max_frames is 0", "use 1 or more"),
    "no training file": (["train", "none.yaml"], "none.yaml", "give the path"),
    "training file with an unknown key": (["train", "run.yaml"], "run.yaml"),
    "override": (["train", "run.yaml", "lr"], "'lr' is not key=value"),
    "no model folder": (["models", "info", "."], "config.json", "no such file"),
    "no golden vectors": (["models", "verify", "."], "no golden vectors"),
}  # fmt: skip
ON_MODEL = ("generate", "animate", "edit", "extend", "score", "encode", "decode")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, run, tiny_model: Path, tmp_path: Path) -> None:
    argv, *words = BAD[case]
    before = tree(tmp_path)
    done = run(*argv, *(["--model", tiny_model] if argv[0] in ON_MODEL and "--model" not in argv else []))
    assert (done.code, done.out, len(done.errors)) == (2, "", 1), done
    assert done.errors[0].startswith("error: ")
    for word in words:
        assert word in done.errors[0]
    assert tree(tmp_path) == before


BEFORE_LOADING = [
    case for case in BAD if BAD[case][0][0] in ON_MODEL
    and case not in ("one pixel", "unknown model", "checkpoint file as model", "frames", "aspect", "seconds it has", "device")
]  # fmt: skip


@pytest.mark.usefixtures("files")
def test_what_can_be_known_is_known_before_a_model_is_loaded(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(reelflow, "load", load, raising=False)
    assert run("generate", "x").code == 1, "or this test proves nothing"
    for case in BEFORE_LOADING:
        assert run(*BAD[case][0]).code == 2, case


def changed_weights(tiny_model: Path, tmp_path: Path, change: str) -> Path:
    folder = tmp_path / change
    shutil.copytree(tiny_model, folder)
    path = folder / "transformer" / "model.safetensors"
    weights = load_file(path)
    if change == "missing":
        del weights["deep_block.proj_in.weight"]
    elif change == "extra":
        weights["surplus.weight"] = torch.zeros(2)
    else:
        weights["deep_block.proj_in.weight"] = torch.zeros(3, 5)
    save_file(weights, path)
    return folder


@pytest.mark.parametrize("change", ["missing", "extra", "misshaped"])
def test_weights_that_do_not_fit(change: str, run, tiny_model: Path, tmp_path: Path) -> None:
    folder = changed_weights(tiny_model, tmp_path, change)
    done = run("generate", "x", "--model", folder, "-o", "a.mp4")
    name = "surplus.weight" if change == "extra" else "deep_block.proj_in.weight"
    assert (done.code, len(done.errors)) == (2, 1)
    assert f"1 {change} ({name}" in done.errors[0]
    assert not (tmp_path / "a.mp4").exists()


def test_a_model_folder_with_a_misspelt_key(run, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"fps"', '"fpz"', 1))
    done = run("generate", "x", "--model", "model")
    assert (done.code, len(done.errors)) == (2, 1)
    assert "fpz" in done.errors[0]


def test_a_long_prompt_is_cut_and_said(run, tiny_model: Path, tmp_path: Path) -> None:
    done = run("generate", "x" * 100 + " zebra", "--model", tiny_model, "-o", "a.mp4", "--guidance", 0, "--frames", 5)
    assert done.code == 0
    assert len(done.errors) == 1
    assert done.errors[0].startswith("note: the prompt is longer than the 48 tokens the text encoder takes; not read: ")
    assert "zebra" in done.errors[0]
    assert len(Clip.open(tmp_path / "a.mp4")) == 5


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """No file may grow beyond this: the operating system refuses, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "frames"])
def test_a_full_disk(name: str, run, tiny_model: Path, tmp_path: Path) -> None:
    with full_disk(2000):
        done = run("generate", "x", "--model", tiny_model, "-o", name, "--guidance", 0, "--frames", 9)
    assert (done.code, done.out, len(done.errors)) == (2, "", 1), done
    assert name in done.errors[0]
    assert "disk is full" in done.errors[0]
    assert "make room" in done.errors[0]
    assert os.listdir(tmp_path) == []


def test_a_full_disk_while_encoding(run, tiny_model: Path, video: Path, tmp_path: Path) -> None:
    with full_disk(500):
        done = run("encode", video, "--model", tiny_model, "-o", "z.safetensors")
    assert (done.code, done.out, len(done.errors)) == (2, "", 1), done
    assert "z.safetensors: cannot be written" in done.errors[0]
    assert os.listdir(tmp_path) == []


def test_the_unexpected_is_a_failure_and_shows_its_trace_on_request(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise RuntimeError("boom\nmore of it")

    monkeypatch.setattr(reelflow, "load", load, raising=False)
    done = run("generate", "x")
    assert (done.code, done.errors) == (1, ["error: RuntimeError: boom more of it; set REELFLOW_DEBUG=1 and run again to see where"])
    monkeypatch.setenv("REELFLOW_DEBUG", "1")
    assert "Traceback (most recent call last):" in run("generate", "x").errors


def test_published_weights_say_their_licence(run, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"licence": "unknown"', '"licence": "apple-amlr"'))
    done = run("generate", "x", "--model", "model", "--frames", 1, "--guidance", 0, "-o", "a.mp4")
    assert done.code == 0
    assert len(done.errors) == 1
    assert done.errors[0].startswith("note: ")
    assert "for research only" in done.errors[0]
