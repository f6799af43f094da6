"""`train prepare`, and training on what it makes, and on clips as they are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from reelflow.clip import Clip

STAGES = [{"steps": 2, "buckets": [{"task": "generate", "frames": 3, "batch": 2}, {"task": "image", "batch": 2}]}]


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Path:
    """Five clips of nine frames, one without a caption."""
    (tmp_path / "clips").mkdir()
    for index in range(5):
        noise = np.random.default_rng(index).integers(0, 255, (9, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        Clip(noise, 8).save(tmp_path / "clips" / f"{index}.mp4")
        if index != 3:
            (tmp_path / "clips" / f"{index}.txt").write_text(f"clip {index}")
    values = {
        "init": str(tiny_model), "data": {"folder": "clips", "max_failed_share": 0.3}, "latents": "latents", "stages": STAGES, "ema": 0,
        "precision": "float32",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


@pytest.mark.usefixtures("config")
def test_prepare_then_train(run, tmp_path: Path) -> None:
    done = run("train", "prepare", "run.yaml", "--json")
    assert (done.code, done.errors) == (0, [])
    said = json.loads(done.out)
    assert (said["latents"], said["clips"], said["failed"], said["shards"]) == ("latents", 4, 1, 1)
    (failure,) = map(json.loads, (tmp_path / "latents" / "failures.jsonl").read_text().splitlines())
    assert failure == {"key": "clips/3.mp4", "reason": "without a caption", "message": "clips/3.mp4 has no caption"}
    again = run("train", "prepare", "run.yaml")
    assert again.out == "latents: 4 clips in 1 shards · 1 of 5 left out, see latents/failures.jsonl\n"
    shutil.rmtree(tmp_path / "clips")
    done = run("train", "run.yaml", "--folder", "trained", "--quiet")
    assert done.code == 0, done.errors
    assert (tmp_path / "trained" / "model" / "transformer" / "model.safetensors").exists()


@pytest.mark.usefixtures("config")
def test_train_on_clips_as_they_are(run, tmp_path: Path) -> None:
    done = run("train", "run.yaml", "latents=null", "--folder", "trained", "--quiet")
    assert done.code == 0, done.errors
    assert (tmp_path / "trained" / "model" / "transformer" / "model.safetensors").exists()
    assert json.loads((tmp_path / "trained" / "failures.jsonl").read_text())["key"] == "clips/3.mp4"
    assert 0 <= json.loads((tmp_path / "trained" / "log.jsonl").read_text())["data_wait"] <= 1


BAD = {
    "no configuration": (["none.yaml"], "none.yaml", "give the path"),
    "misspelt key": (["run.yaml", "data.foldr=x"], "data.foldr = 'x'"),
    "unknown source": (["run.yaml", "data={tapes: x}"], "data.tapes = 'x'"),
    "no source": (["run.yaml", "data={}"], "data names no source; give folder, shards, hub or toybox"),
    "no data": (["run.yaml", "data=null"], "nothing to prepare; say under data where the clips are"),
    "no place": (["run.yaml", "latents=null"], "nowhere to put latents; name a folder"),
    "no permission": (["run.yaml", "latents=/proc/latents"], "/proc/latents", "choose another folder"),
    "no folder": (["run.yaml", "data.folder=none"], "none: no such folder"),
    "empty folder": (["run.yaml", "data.folder=empty"], "empty: no videos or pictures here"),
    "no captions": (["run.yaml", "data.folder=bare"], "bare: 1 clips and no caption; put a .txt"),
    "no shards": (["run.yaml", "data={shards: 'none/*.tar'}"], "no such shards"),
    "no dataset": (["run.yaml", "data={hub: {name: nobody/nothing}}"], "nobody/nothing: the dataset cannot be read"),
    "length": (["run.yaml", "data.frames=10"], "frames = 10", "nearest: 9 or 13"),
    "too short": (["run.yaml", "data.frames=17"], "too short: clips/0.mp4", "max_failed_share"),
    "too many failures": (["run.yaml", "data.max_failed_share=0.1"], "1 (1 without a caption: clips/3.mp4) of 5 clips cannot be used"),
}


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, run, tmp_path: Path) -> None:
    argv, *words = BAD[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "clips" / "0.mp4", tmp_path / "bare")
    done = run("train", "prepare", *argv)
    assert (done.code, done.out, len(done.errors)) == (2, "", 1), done
    for word in words:
        assert word in done.errors[0]


def test_usage(run) -> None:
    done = run("train", "prepare")
    assert (done.code, done.errors) == (2, ["error: Missing argument 'CONFIG.yaml'; see: reelflow train prepare --help"])
    helped = run("train", "prepare", "--help")
    assert helped.code == 0
    assert "--nproc-per-node" in helped.out


@pytest.mark.usefixtures("config")
def test_ctrl_c_says_what_stays(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from reelflow.training import latents

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(latents, "write_shard", stop)
    done = run("train", "prepare", "run.yaml")
    assert (done.code, done.errors) == (130, ["interrupted: latents holds the shards that are done; the same command goes on from there"])


@pytest.mark.slow
def test_two_processes_share_the_work(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts them."""
    shutil.copytree(tmp_path / "clips", tmp_path / "more")
    argv = [sys.executable, "-W", "ignore", "-m", "reelflow", "train", "prepare", str(config), "data.folder=[clips, more]", "--json"]
    processes = [
        subprocess.Popen(
            argv, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=170) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert json.loads(said[0][0]) | {"latents": ""} == {"latents": "", "clips": 8, "failed": 2, "shards": 2, "done": 1.0, "seconds_left": 0}
    assert said[1][0] == ""
    assert sorted(path.stem for path in (tmp_path / "latents").glob("*.safetensors")) == ["00000-0000", "00001-0000"]
