"""Stable Video Diffusion from the command line, on a tiny random model in a folder of diffusers."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import reelflow
from reelflow import Clip

tiny = runpy.run_path(str(Path(__file__).parent.parent / "pipelines" / "svd_tiny.py"))
QUICK = ("--steps", 1, "--frames", 2)


@pytest.fixture(scope="session")
def svd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_tiny"](tmp_path_factory.mktemp("model") / "tiny-svd")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_animate(run, svd_model: Path, photo: Path, tmp_path: Path) -> None:
    options = ("--motion", 200, "--fps", 12, "--playback", 24, "--noise-aug", 0.1, "--guidance", 2, "--first-guidance", 1.5)
    done = run("animate", photo, "--model", svd_model, "--seed", 3, "--size", "128x64", "--json", "-o", "a.mp4", *options, *QUICK)
    assert (done.code, done.errors) == (0, [])
    said = json.loads(done.out)
    assert (said["frames"], said["width"], said["height"], said["fps"], said["seed"]) == (2, 128, 64, 24, 3)
    assert said["settings"] == {
        "frames": 2, "steps": 1, "fps": 12, "motion": 200, "noise_aug": 0.1, "guidance": 2.0, "first_guidance": 1.5, "playback": 24.0,
        "reference": "stability", "schedule": "karras", "guided": None, "reuse": 1,
    }  # fmt: skip
    assert {"encoding", "sampling", "decoding"} == said["times"].keys()
    made = Clip.open(tmp_path / "a.mp4").metadata
    assert (made["family"], made["seed"], made["ai_generated"]) == ("svd", 3, True)


def test_less_work(run, svd_model: Path, photo: Path) -> None:
    options = ("--schedule", "ays", "--guided", "0.5-100", "--reuse", 3, "--steps", 4, "--frames", 2, "--size", "64x64")
    done = run("animate", photo, "--model", svd_model, "--seed", 3, "--json", "-o", "a.gif", *options)
    assert (done.code, done.errors) == (0, [])
    assert json.loads(done.out)["settings"].items() >= {"schedule": "ays", "guided": [0.5, 100.0], "reuse": 3}.items()


def test_extend_says_that_quality_drifts(run, svd_model: Path, tmp_path: Path) -> None:
    Clip(np.zeros((2, 64, 64, 3), np.uint8), 8).save(tmp_path / "short.gif")
    done = run("extend", "short.gif", "--seconds", 0.5, "--model", svd_model, "-o", "long.gif", "--steps", 1, "--guidance", 1)
    assert done.code == 0
    assert done.errors == ["note: 1 clips are joined; each begins from one frame, so motion restarts and quality drifts from seam to seam"]
    assert len(Clip.open(tmp_path / "long.gif")) == 4


BAD = {
    "steps": (["--steps", "0"], "steps 0 is not usable; give a whole number from 1 to 1000"),
    "fps": (["--fps", "31"], "fps 31 is not usable; give a whole number from 3 to 30"),
    "slow fps": (["--fps", "2"], "fps 2 is not usable"),
    "motion": (["--motion", "0"], "motion 0 is not usable; give a whole number from 1 to 255"),
    "more motion": (["--motion", "256"], "motion 256 is not usable"),
    "noise": (["--noise-aug", "nan"], "noise_aug nan is not usable; give a number from 0 to 1"),
    "guidance": (["--first-guidance", "-1"], "first_guidance -1.0 is not usable; give a number ≥ 0"),
    "levels in words": (["--guided", "high"], "guided 'high' is not LOW-HIGH, two noise levels such as 1-100"),
    "levels that fall": (["--guided", "100-1"], "guided 100-1 is not usable; give a lower and a higher noise level"),
    "reuse": (["--reuse", "0"], "reuse 0 is not usable; give a whole number from 1"),
    "playback": (["--playback", "0"], "playback 0.0 is not usable; give 0.1 … 240"),
    "size": (["--size", "1000x576"], "size 1000x576: sides are multiples of 64 up to 4096; nearest: 1024x576"),
    "size in words": (["--size", "large"], "size 'large' is not WIDTHxHEIGHT"),
    "large size": (["--size", "20032x64"], "nearest: 4096x64"),
    "an option of flows": (["--ring"], "does not know --ring; it knows --first, --first-guidance, --fps, --guidance"),
    "a sampler of flows": (["--sampler", "sequential"], "does not know --sampler"),
    "too long": (["--frames", "17"], "17 frames are more than tiny-svd makes at once (16)"),
    "one pixel": (["dot.png"], "the picture is 1 × 1 pixels; give one of at least 16 × 16"),
    "20,000 pixels": (["wall.png"], "wall.png is too large to decode"),
}


def test_a_panorama_is_cut_to_its_middle(run, svd_model: Path, tmp_path: Path) -> None:
    """20,000 pixels in one direction are no trouble."""
    strip = np.zeros((20, 20_000, 3), np.uint8)
    strip[:, 9_990:10_010] = 255
    Image.fromarray(strip).save(tmp_path / "strip.png")
    done = run("animate", "strip.png", "--model", svd_model, "-o", "a.gif", *QUICK)
    assert (done.code, done.errors) == (0, [])


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, run, svd_model: Path, photo: Path, tmp_path: Path) -> None:
    options, words = BAD[case]
    if case == "one pixel":
        Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    if case == "20,000 pixels":
        Image.new("1", (20_000, 20_000)).save(tmp_path / "wall.png")
    picture = [] if options[0].endswith(".png") else ["photo.png"]
    done = run("animate", *picture, *options, "--model", svd_model, "-o", "a.mp4")
    assert (done.code, done.out, len(done.errors)) == (2, "", 1), done
    assert words in done.errors[0]
    assert not (tmp_path / "a.mp4").exists()


def test_flows_refuse_options_of_svd_before_they_are_loaded(run, tiny_model: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(reelflow, "load", load, raising=False)
    for option in (["--motion", 9], ["--size", "64x64"], ["--reference", "diffusers"], ["--steps", 3]):
        done = run("animate", photo, "--model", tiny_model, *option)
        assert (done.code, len(done.errors)) == (2, 1)
        assert f"does not know {option[0]}; it knows --certify, --denoise, --guidance" in done.errors[0]
    assert run("generate", "x", "--model", tiny_model, "--first", "mini").code == 2


@pytest.mark.parametrize(("command", "task"), [(["edit", "a.gif", "make it blue"], "edit"), (["score", "a.gif"], "score"),
                                               (["encode", "a.gif", "-o", "z.safetensors"], "encode")])  # fmt: skip
def test_what_it_cannot_do_another_family_can(command: list[str], task: str, run, svd_model: Path, tmp_path: Path) -> None:
    Clip(np.zeros((2, 64, 64, 3), np.uint8), 8).save(tmp_path / "a.gif")
    done = run(*command, "--model", svd_model)
    assert (done.code, done.errors) == (2, [f"error: tiny-svd (svd) does not {task}; use a starflow-v model"])


def test_it_does_not_stream(run, svd_model: Path) -> None:
    done = run("generate", "x", "--model", svd_model, "--stream")
    assert (done.code, len(done.errors)) == (2, 1)
    assert "does not know --stream" in done.errors[0]


def test_models_info(run, svd_model: Path) -> None:
    card = json.loads(run("models", "info", svd_model, "--json").out)
    counts = {part: sum(p.numel() for p in getattr(tiny["tiny_parts"](), part).parameters()) for part in ("unet", "vae", "image_encoder")}
    assert card["parameters"] == counts | {"total": sum(counts.values())}
    assert (card["family"], card["frames"]) == ("svd", 4)
    assert run("models", "info", svd_model).code == 0


def test_bench_svd(run, svd_model: Path, tiny_model: Path) -> None:
    done = run("bench", "svd", "--model", svd_model, "--steps", 1, "--frames", 2, "--size", "64x64", "--json")
    assert (done.code, done.errors) == (0, [])
    found = json.loads(done.out)
    assert (found["frames"], found["size"], found["steps"], set(found["rows"])) == (2, [64, 64], 1, {"reelflow"})
    for options, words in (
        (["--model", tiny_model], "is no Stable Video Diffusion"),
        (["--model", svd_model, "--size", "65x64"], "nearest: 64x64"),
        (["--model", svd_model, "--precision", "int8"], "precision 'int8': this family comes in float32 and bfloat16"),
    ):
        done = run("bench", "svd", *options)
        assert (done.code, len(done.errors)) == (2, 1), done
        assert words in done.errors[0]
