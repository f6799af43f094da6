"""The command line in this process, in an empty folder, on the tiny model; what it says, line by line."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import reelflow.cli
from reelflow import Clip

tiny = runpy.run_path(str(Path(__file__).parent.parent / "pipelines" / "tiny.py"))


class Done(NamedTuple):
    """Exit code, and what was printed."""

    code: int
    out: str
    errors: list[str]


Run = Callable[..., Done]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_tiny"](tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def video(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video at the model's own size and rate, 9 frames."""
    path = tmp_path_factory.mktemp("video") / "ball.mp4"
    clip = reelflow.load(tiny_model, "cpu").generate("a red ball", seed=1)
    clip.save(path)
    assert len(Clip.open(path)) == 9
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`run("generate", "x", …)`: the command in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> Done:
        capfd.readouterr()
        code = reelflow.cli.main([str(part) for part in argv])
        out, errors = capfd.readouterr()
        return Done(code, out, errors.splitlines())

    return run
