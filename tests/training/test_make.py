"""The one command that makes a small model from nothing: what it runs, in which order, and that it goes on where it was."""

from __future__ import annotations

import importlib.util
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from reelflow.adapters.lora import OWN
from reelflow.training.config import load
from reelflow.training.svd.vae import SVD
from reelflow.training.vae import WAN, arguments
from reelflow.training.vae_batches import VaeTraining

MAKE = Path(__file__).parents[2] / "examples" / "make.py"
KINDS = {"reelflow.training.vae": WAN, "reelflow.training.svd.vae": SVD}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make", MAKE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.mark.parametrize("name", ["mini", "mini_svd"])
def test_every_part_is_a_command_that_its_program_takes(make: ModuleType, name: str) -> None:
    parts = make.commands(name, ["seed=3"])
    *vaes, (_, prepare), (_, train) = parts[:-3] if name == "mini" else parts
    if name == "mini_svd":
        made, (_, module, folder) = vaes.pop()
        assert (module, Path(folder)) == (make.ALONE, made), "the tower is what shows that it is done"
        assert find_spec(module) is not None
        assert all(f"image_encoder={made}" in part for part in (prepare, train))
    last = None
    for made, (_, module, *rest) in vaes:
        options = vars(arguments(KINDS[module]).parse_args(rest))
        assert options["start"] == last, "each begins with what the one before made"
        assert options["decoder_only"] == (last is not None), "which moves no latents"
        assert options["export"] == made
        VaeTraining.parse({key: options[key] for key in VaeTraining.model_fields if key in options})
        last = made
    for words in (prepare[4:], train[3:-2]):
        config = load(Path(words[0]), words[1:])
        assert (config.seed, Path(config.vae), config.latents) == (3, last, Path(f"runs/{name}-latents"))
    assert train[-2:] == ["--folder", f"runs/{name}"]


def test_what_mini_has_on_top_is_trained_from_it_and_put_into_its_folder(make: ModuleType) -> None:
    (made, prepare), (_, train), (_, coarsen) = make.commands("mini", [])[-3:]
    assert made == Path("runs/mini/model/transformer") / OWN
    recipe = Path(train[3])
    assert prepare[4:] == [str(recipe)]
    assert yaml.safe_load(recipe.read_text(encoding="utf-8"))["init"] == "runs/mini/model"
    config = load(recipe, ["init=mini"])
    assert config.lora is not None
    program, trained, target = coarsen
    assert Path(program).is_file()
    assert (Path(trained), Path(target)) == (Path(train[-1]) / f"{config.about.name}.safetensors", made)


def test_it_goes_on_where_it_was_and_stops_where_a_part_fails(make: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    codes = iter((0, 7, 0, 0, 0, 0))

    def call(command: list[str]) -> int:
        called.append(command)
        if "--export" in command and (code := next(codes)) == 0:
            target = Path(command[command.index("--export") + 1])
            target.mkdir(parents=True)
            (target / "config.json").touch()
            return code
        return 7 if "--export" in command else next(codes)

    monkeypatch.setattr(make.subprocess, "call", call)
    monkeypatch.setattr(sys, "argv", ["make.py", "mini_svd", "--processes", "2", "lr=1e-4"])
    assert make.main() == 7
    assert [command[6] for command in called] == ["reelflow.training.svd.vae"] * 2
    assert called[0][1:5] == ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    called.clear()
    assert make.main() == 0
    vae, tower, *rest = called
    assert vae[7] == "runs/mini_svd-vae-2", "the first VAE is there"
    assert tower[1:] == ["-m", make.ALONE, "runs/mini_svd-tower"], "by one process"
    assert [command[6:8] for command in rest] == [["reelflow", "train"]] * 2
    assert all("lr=1e-4" in command for command in rest)
