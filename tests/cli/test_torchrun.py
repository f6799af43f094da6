"""Commands as two processes: one clip, one that talks, one word about an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reelflow import Clip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")]
SOURCE = Path(__file__).parent.parent.parent / "src"


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "reelflow"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.Popen(
        [*command, *map(str, arguments)], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def said(errors: str) -> list[str]:
    """Our own lines; torchrun adds its own to those of a process that failed."""
    return [line for line in errors.splitlines() if line.startswith(("error:", "note:", "interrupted:"))]


def test_a_clip_of_two_processes_is_that_of_one(run, tiny_model: Path, tmp_path: Path) -> None:
    """Without a seed they agree on one; result and file come once."""
    settings = ["--model", tiny_model, "--tolerance", "1e-5", "--seconds", "1.9", "--json"]
    process = start(tmp_path, "generate", "a red ball", *settings, "--stream", "-o", "two/")
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert said(errors) == []
    made = json.loads(out)
    assert run("generate", "a red ball", *settings, "--seed", made["seed"], "-o", "one/").code == 0
    two, one = (Clip.open(tmp_path / name).frames.astype(int) for name in ("two", "one"))
    assert made["frames"] == len(two) == 17
    assert np.abs(two - one).max() <= 1


def test_an_error_of_all_is_said_once(tmp_path: Path) -> None:
    process = start(tmp_path, "generate", "a red ball", "--silly")
    _, errors = process.communicate(timeout=500)
    assert process.returncode != 0
    (line,) = said(errors)
    assert line.startswith("error: No such option: --silly")


def test_one_process_that_ends_ends_all(tiny_model: Path, tmp_path: Path) -> None:
    """Ctrl-C for the second process, in the middle of sampling; the first one is streaming into a file."""
    settings = ["--model", tiny_model, "--seconds", "2000", "--sampler", "sequential", "--stream", "-o", "long.mp4"]
    process = start(tmp_path, "generate", "x" * 100, *settings)
    assert process.stderr is not None
    early = next(line for line in process.stderr if line.startswith("note:"))
    assert "longer than the 48 tokens" in early
    while not list(tmp_path.iterdir()):  # the file under its temporary name
        assert process.poll() is None
    _, second = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(second), signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert [line for line in said(errors) if not line.startswith("note:")] == ["interrupted: nothing was written"]
    assert not list(tmp_path.iterdir())
