"""Folders of Stable Video Diffusion: what loads, in which precision, and what is said of those that do not."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reelflow.adapters import hub
from reelflow.adapters.svd import load_parts

tiny = runpy.run_path(str(Path(__file__).parent.parent / "pipelines" / "svd_tiny.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_tiny"](tmp_path_factory.mktemp("model") / "stable-video-diffusion-tiny")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def test_a_folder_is_loaded_bit_by_bit(folder: Path) -> None:
    parts, source = load_parts(folder), tiny["tiny_parts"]()
    for part in ("unet", "vae", "image_encoder"):
        held, wanted = getattr(parts, part).state_dict(), getattr(source, part).state_dict()
        assert held.keys() == wanted.keys()
        assert all(torch.equal(held[name], wanted[name]) for name in held), part
        assert not any(parameter.requires_grad for parameter in getattr(parts, part).parameters())
    assert parts.scheduler.config.sigma_max == 700
    assert (parts.about.family, parts.about.frames, parts.about.size, parts.about.fps) == ("svd", 4, 64, 7)
    assert (parts.about.name, parts.about.licence) == (folder.name, "stable-video-diffusion-community")
    assert parts.clip_mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_its_own_configuration_comes_first(copy: Path) -> None:
    about = tiny["tiny_parts"]().about.model_copy(update={"name": "mine", "fps": 12.0})
    about.write(copy / "config.json")
    assert load_parts(copy).about == about


def test_a_variant_in_half_precision(tmp_path: Path) -> None:
    parts = load_parts(tiny["write_tiny"](tmp_path / "model", variant="fp16"))
    assert parts.unet.dtype == torch.float32
    assert not list((tmp_path / "model").rglob("diffusion_pytorch_model.safetensors"))


def test_of_both_variants_the_one_that_is_enough(copy: Path) -> None:
    for path in copy.rglob("*.safetensors"):
        halves = {name: (tensor * 2).half() for name, tensor in load_file(path).items()}
        save_file(halves, path.with_suffix(".fp16.safetensors"))
    full, half = load_parts(copy), load_parts(copy, dtype=torch.bfloat16)
    assert (full.unet.dtype, half.unet.dtype, half.vae.decoder.conv_in.weight.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert half.vae.encoder.conv_in.weight.dtype == half.vae.quant_conv.weight.dtype == torch.float32
    ratio = half.unet.conv_in.weight.float() / full.unet.conv_in.weight
    assert ratio.median() == pytest.approx(2, rel=0.01), "from the halves"


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def changed(file: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def weights(file: str, name: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = load_file(folder / file)
        state.pop(name, None)
        save_file(state | ({name: value} if value is not None else {}), folder / file)

    return change


UNET = "unet/diffusion_pytorch_model.safetensors"
BAD = {
    "no unet": (without("unet"), "unet/config.json: no such file; the folder of a StableVideoDiffusionPipeline has unet, vae"),
    "no vae": (without("vae"), "vae/config.json: no such file"),
    "no image encoder": (without("image_encoder"), "image_encoder/config.json: no such file"),
    "no scheduler": (without("scheduler"), "scheduler/scheduler_config.json: no such file"),
    "no weights": (without(UNET), "unet: no weights here; expected diffusion_pytorch_model.safetensors"),
    "another pipeline": (
        changed("model_index.json", _class_name="StableDiffusionXLPipeline"),
        "a StableDiffusionXLPipeline, not Stable Video Diffusion; give the folder of",
    ),
    "no pipeline": (lambda folder: (folder / "model_index.json").write_text("[]"), "model_index.json: holds a list"),
    "no JSON": (lambda folder: (folder / "unet" / "config.json").write_text("{"), "unet/config.json: not JSON"),
    "another answer": (changed("scheduler/scheduler_config.json", prediction_type="epsilon"), "predicts epsilon; .* predicts v"),
    "another VAE": (changed("vae/config.json", _class_name="AutoencoderKLWan"), "cannot be used .'AutoencoderKLWan'"),
    "another width": (changed("unet/config.json", block_out_channels=[32, 96]), r"unet: the weights do not fit .* misshaped \("),
    "a tensor less": (weights(UNET, "conv_in.bias", None), r"unet: the weights do not fit the configuration: 1 missing \(conv_in.bias\)"),
    "a tensor more": (weights(UNET, "surplus", torch.zeros(1)), r"1 extra \(surplus\)"),
    "not finite": (weights(UNET, "conv_in.bias", torch.full((32,), torch.inf)), r"unet: 1 tensors hold NaN or infinity \(conv_in.bias\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_folders_that_do_not_load(case: str, copy: Path) -> None:
    change, words = BAD[case]
    change(copy)
    with pytest.raises(ValueError, match=words) as error:
        load_parts(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("half", [False, True])
def test_names_are_fetched_once(half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repositories hold every weight four times: in two precisions, and in two single files."""
    asked = {}

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked[name] = ignore_patterns
        (tmp_path / "model_index.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.resolve("svd-xt", half=half) == tmp_path
    ignored = asked["stabilityai/stable-video-diffusion-img2vid-xt"]
    assert "svd*.safetensors" in ignored
    assert ("*.fp16.safetensors" in ignored) != half
    assert ("*/diffusion_pytorch_model.safetensors" in ignored) == half
    (tmp_path / "svd").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("svd") == Path("svd"), "a folder of that name is meant"
