"""LoRA files: what they say is what is added, and a file that does not fit is refused by name."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import reelflow
from reelflow.adapters import lora
from reelflow.adapters.checkpoint import read_weights
from reelflow.adapters.lora import Lora, flow_weights, merge, parse, save
from reelflow.config import ModelConfig
from reelflow.evaluation.card import describe
from reelflow.pipelines.starflow import StarFlowPipeline

tiny = runpy.run_path(str(Path(__file__).parent.parent / "pipelines" / "tiny.py"))
QKV, UP = "deep_block.layers.1.attention.qkv", "denoiser.layers.0.mlp.up"
ABOUT = {"rank": 3, "alpha": 6.0, "targets": [QKV], "name": "heart", "model": "tiny", "revision": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_tiny"](tmp_path_factory.mktemp("model") / "tiny")


def matrices(seed: int = 0, width: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {QKV + lora.DOWN: (3, width), QKV + lora.UP: (3 * width, 3), UP + lora.DOWN: (3, 32), UP + lora.UP: (128, 3)}
    return {name: (0.3 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()}


def write(path: Path, tensors: dict[str, Tensor] | None = None, **about: object) -> Path:
    save(path, tensors or matrices(), ABOUT | about)
    return path


def weight_of(pipe: StarFlowPipeline, layer: str) -> Tensor:
    return dict(pipe.flow.named_parameters())[f"{layer}.weight"]


def load(model: Path) -> StarFlowPipeline:
    pipe = reelflow.load(model, "cpu")
    assert isinstance(pipe, StarFlowPipeline)
    return pipe


def test_what_is_added(model: Path, tmp_path: Path) -> None:
    """W + weight · alpha / rank · B A, the other layers as they were; several add up."""
    pipe, plain, given = load(model), load(model), matrices()
    pipe.load_lora(write(tmp_path / "heart.safetensors"), 0.5)
    change = 0.5 * 6 / 3 * given[QKV + lora.UP].float() @ given[QKV + lora.DOWN].float()
    torch.testing.assert_close(weight_of(pipe, QKV), weight_of(plain, QKV) + change)
    changed = {name for name, p in pipe.flow.named_parameters() if not torch.equal(p, dict(plain.flow.named_parameters())[name])}
    assert changed == {f"{QKV}.weight", f"{UP}.weight"}
    pipe.load_lora(tmp_path / "heart.safetensors", -0.5)
    torch.testing.assert_close(weight_of(pipe, QKV), weight_of(plain, QKV), atol=1e-6, rtol=1e-5)
    clip = pipe.generate("a red ball", seed=0, frames=1)
    assert clip.metadata["settings"]["lora"] == [{"file": "heart.safetensors", "weight": w} for w in (0.5, -0.5)]
    assert "lora" not in plain.generate("a red ball", seed=0, frames=1).metadata["settings"]


def test_a_merged_folder_is_the_model_with_the_lora(model: Path, tmp_path: Path) -> None:
    first, second = write(tmp_path / "heart.safetensors"), write(tmp_path / "pink.safetensors", matrices(1))
    about = merge(model, [(Lora.open(first), 0.5), (Lora.open(second), 1.0)], tmp_path / "merged")
    pipe = load(model)
    pipe.load_lora(first, 0.5)
    pipe.load_lora(second)
    merged = load(tmp_path / "merged")
    assert merged.about == about == ModelConfig.read(model / "config.json").model_copy(update={"name": "tiny-heart-pink"})
    for name, p in pipe.flow.named_parameters():
        torch.testing.assert_close(dict(merged.flow.named_parameters())[name], p)
    assert "heart.safetensors, weight 0.5" in (tmp_path / "merged" / "README.md").read_text()
    stored = read_weights(tmp_path / "merged" / "transformer")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {n: t.dtype for n, t in read_weights(model / "transformer").items()}


@pytest.mark.filterwarnings("error")  # one of another revision, too
def test_one_in_a_models_folder_is_a_part_of_it(model: Path, tmp_path: Path) -> None:
    """Wherever its weights are read: in the type they are stored in, and without a word."""
    folder, given = tmp_path / "adapted", matrices()
    shutil.copytree(model, folder)
    write(folder / "transformer" / lora.OWN, revision="0")
    plain, found = read_weights(model / "transformer"), flow_weights(folder / "transformer")
    assert list(found) == list(plain)
    changed = {name for name in plain if not torch.equal(found[name], plain[name])}
    assert changed == {f"{QKV}.weight", f"{UP}.weight"}
    change = 2 * given[QKV + lora.UP].float() @ given[QKV + lora.DOWN].float()
    assert torch.equal(found[f"{QKV}.weight"], plain[f"{QKV}.weight"] + change)
    assert torch.equal(weight_of(load(folder), QKV), found[f"{QKV}.weight"])
    assert describe(str(folder))["parameters"] == describe(str(model))["parameters"]
    merge(folder, [(Lora.open(write(tmp_path / "heart.safetensors", matrices(1))), 0.0)], tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged" / "transformer").iterdir()} == {"config.json", "model.safetensors"}
    assert torch.equal(read_weights(tmp_path / "merged" / "transformer")[f"{UP}.weight"], found[f"{UP}.weight"])
    save(folder / "transformer" / lora.OWN, {name.replace("layers.1", "layers.7"): tensor for name, tensor in given.items()}, ABOUT)
    with pytest.raises(ValueError, match=r"adapter.safetensors: a LoRA of another architecture than .*: 1 layers .*\(deep_block.layers.7"):
        load(folder)
    write(folder / "transformer" / lora.OWN, matrices(0, 96))
    with pytest.raises(ValueError, match=r"another architecture than .*: 1 layers do not fit .*\(288, 96\) instead of \(192, 64\)"):
        load(folder)


def test_one_of_another_architecture_is_refused(model: Path, tmp_path: Path) -> None:
    wide = write(tmp_path / "wide.safetensors", matrices(0, 96), model="maxi")
    pipe = load(model)
    before = weight_of(pipe, UP).clone()
    with pytest.raises(ValueError, match=r"wide\.safetensors: a LoRA of another architecture than tiny: 1 layers do not fit") as error:
        pipe.load_lora(wide)
    assert f"({QKV} (288, 96) instead of (192, 64)); it was trained on maxi" in str(error.value)
    assert torch.equal(weight_of(pipe, UP), before)
    with pytest.raises(ValueError, match="another architecture"):
        merge(model, [(Lora.open(wide), 1.0)], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_one_of_another_model_is_said(model: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="was trained on tiny revision 2, this is tiny revision 1"):
        load(model).load_lora(write(tmp_path / "heart.safetensors", revision="2"))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.safetensors: no such file; give the \.safetensors file of a LoRA"):
        Lora.open(tmp_path / "none.safetensors")
    save_file(matrices(), tmp_path / "bare.safetensors")
    half = {name: tensor for name, tensor in matrices().items() if name != QKV + lora.UP}
    save_file(half, tmp_path / "half.safetensors", {lora.HEADER: json.dumps(ABOUT)})
    (tmp_path / "text.safetensors").write_text("no")
    for name in ("bare", "half"):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors: not a LoRA of this package"):
            Lora.open(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Lora.open(tmp_path / "text.safetensors")


def test_file_and_weight() -> None:
    assert parse("a/heart.safetensors") == (Path("a/heart.safetensors"), 1.0)
    assert parse("a:b/heart.safetensors") == (Path("a:b/heart.safetensors"), 1.0)
    assert parse("heart.safetensors:-0.25") == (Path("heart.safetensors"), -0.25)
