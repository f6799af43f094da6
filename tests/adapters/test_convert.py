"""Reference checkpoint → model folder: complete, strict, whole or not at all, in a fraction of the file's size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from reelflow.adapters import convert as module
from reelflow.adapters.checkpoint import load_into, read_weights
from reelflow.adapters.convert import convert, inspect, open_checkpoint
from reelflow.adapters.names import rename
from reelflow.config import FlowConfig, ModelConfig
from reelflow.flow.model import StarFlow

VIDEO, IMAGE = "starflow-v_7B_t2v_caus_480p", "starflow_3B_t2i_256x256"
WIDTHS = {VIDEO: {"channels": 64, "top_block_channels": 128, "layers_per_block": "2 2 2 2 2 4"}, IMAGE: {"channels": 64}}
TEXT_DIM = 24


@pytest.fixture(params=[VIDEO, IMAGE])
def checkpoint(request: pytest.FixtureRequest, reference: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A published model at reduced width: the real key set, random values; `.path`, `.arguments` (a YAML file), `.state`."""
    return make(reference, tmp_path, request.param)


def make(reference: SimpleNamespace, folder: Path, name: str) -> SimpleNamespace:
    arguments = reference.published[name] | WIDTHS[name]
    state = reference.random_state(reference.shapes(reference.constructor(arguments, TEXT_DIM)))
    path, settings = folder / "model.pth", folder / "model.yaml"
    torch.save(state, path)
    settings.write_text("arguments:\n" + "".join(f"- {key}: {json.dumps(value)}\n" for key, value in arguments.items()))
    return SimpleNamespace(path=path, arguments=settings, state=state, values=arguments)


def same(ours: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    kept = {rename(key, 6): tensor for key, tensor in state.items()}
    kept.pop(None)
    return kept.keys() == ours.keys() and all(torch.equal(kept[name].reshape(tensor.shape), tensor) for name, tensor in ours.items())


def test_a_converted_folder_is_complete(checkpoint: SimpleNamespace, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    model = convert(
        checkpoint.path, checkpoint.arguments, tmp_path / "out", max_shard_bytes=1_000_000, progress=lambda *step: steps.append(step)
    )
    out = tmp_path / "out"
    assert ModelConfig.read(out / "config.json") == model
    assert model.name == "model"
    flow_config = FlowConfig.read(out / "transformer" / "config.json")
    assert flow_config.text_dim == TEXT_DIM
    weights = read_weights(out / "transformer")
    assert same(dict(weights), checkpoint.state)
    with torch.device("meta"):
        flow = StarFlow(flow_config)
    load_into(flow, weights)
    assert same(flow.state_dict(), checkpoint.state)
    assert len(steps) == len(list((out / "transformer").glob("model-*.safetensors"))) > 5
    assert steps == sorted(steps)
    assert steps[-1] == (4 * sum(tensor.numel() for tensor in weights.values()),) * 2


def test_reading_without_converting(checkpoint: SimpleNamespace) -> None:
    model, flow, weights = open_checkpoint(checkpoint.path, checkpoint.arguments)
    assert same(weights, checkpoint.state)
    assert (model, flow) == inspect(checkpoint.path, checkpoint.values)[:2]


def test_half_precision(checkpoint: SimpleNamespace, tmp_path: Path) -> None:
    convert(checkpoint.path, checkpoint.arguments, tmp_path / "out", dtype=torch.bfloat16)
    weights = read_weights(tmp_path / "out" / "transformer")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert [path.name for path in (tmp_path / "out" / "transformer").glob("*.safetensors")] == ["model.safetensors"]
    assert same({name: tensor.float() for name, tensor in weights.items()}, {k: t.bfloat16().float() for k, t in checkpoint.state.items()})


@pytest.mark.parametrize("name", [VIDEO, IMAGE])
def test_published_files_need_no_yaml_and_carry_their_licence(reference: SimpleNamespace, tmp_path: Path, name: str) -> None:
    """Shapes only: the published sizes would not fit into a test."""
    made = make(reference, tmp_path, name)
    renamed = made.path.rename(tmp_path / f"{name}_v3.pth")
    with pytest.raises(ValueError, match="misshaped"):
        inspect(renamed)
    model = inspect(renamed, made.values).model
    assert model.licence == "apple-amlr"
    with pytest.raises(ValueError, match="not a published file name"):
        inspect(renamed.rename(tmp_path / "other.pth"))


def broken(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    state = dict(state)
    if how == "missing":
        del state["blocks.3.proj_in.bias"]
    elif how == "unknown":
        state["blocks.3.proj_mid.bias"] = torch.zeros(1)
    elif how == "extra":
        state["blocks.5.attn_blocks.99.attention.qkv.bias"] = torch.zeros(1)
    elif how == "misshaped":
        state["blocks.0.sos_embed"] = torch.zeros(1, 1, 5)
    elif how == "twice":
        state["blocks.0.attn_blocks.0.mlp.up_proj.weight"] = state["blocks.0.attn_blocks.0.mlp.main.0.weight"]
    elif how == "not finite":
        state["blocks.5.final_norm.weight"] = state["blocks.5.final_norm.weight"] * float("nan")
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"1 missing \(shallow_blocks.3.proj_in.bias\)"),
        ("unknown", r"1 unknown tensors \(blocks.3.proj_mid.bias\)"),
        ("extra", r"1 extra \(deep_block.layers.99.attention.qkv.bias\)"),
        ("misshaped", r"1 misshaped \(shallow_blocks.0.sos \(5,\) instead of \(4,\)\)"),
        ("twice", r"1 unknown tensors \(blocks.0.attn_blocks.0.mlp.up_proj.weight\)"),
        ("not finite", r"1 tensors hold NaN or infinity \(deep_block.final_norm.weight\)"),
    ],
)
def test_every_key_is_accounted_for(reference: SimpleNamespace, tmp_path: Path, how: str, message: str) -> None:
    made = make(reference, tmp_path, IMAGE)
    torch.save(broken(made.state, how), made.path)
    with pytest.raises(ValueError, match=message) as error:
        convert(made.path, made.arguments, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "model.yaml"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_interrupted_leaves_nothing(reference: SimpleNamespace, tmp_path: Path, failure: type[BaseException]) -> None:
    made = make(reference, tmp_path, IMAGE)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise failure

    with pytest.raises(failure):
        convert(made.path, made.arguments, tmp_path / "out", max_shard_bytes=1_000_000, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "model.yaml"]


def test_full_disk_is_said_before_writing(reference: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(reference, tmp_path, IMAGE)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="out: needs 0.0 GB, the disk has 0.0 GB free"):
        convert(made.path, made.arguments, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "model.yaml"]


def test_existing_folders_are_kept(reference: SimpleNamespace, tmp_path: Path) -> None:
    made = make(reference, tmp_path, IMAGE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ValueError, match="exists already"):
        convert(made.path, made.arguments, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def wan_folder(folder: Path, channels: int) -> Path:
    statistics = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    shape: dict[str, Any] = {"dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True], "is_residual": True, "patch_size": 2}
    AutoencoderKLWan(base_dim=8, z_dim=channels, num_res_blocks=1, in_channels=12, out_channels=12, **shape, **statistics).save_pretrained(
        folder
    )
    return folder


def t5_folder(folder: Path, width: int) -> Path:
    T5EncoderModel(T5Config(vocab_size=8, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("a pickle")
    return folder


def test_parts_are_copied_in(reference: SimpleNamespace, tmp_path: Path) -> None:
    made = make(reference, tmp_path, VIDEO)
    vae, text = wan_folder(tmp_path / "vae", 48), t5_folder(tmp_path / "t5", TEXT_DIM)
    assert convert(made.path, made.arguments, tmp_path / "a", vae=vae, text_encoder=text).parts == {}
    assert {path.name for path in (tmp_path / "a" / "vae").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert {path.name for path in (tmp_path / "a" / "text_encoder").iterdir()} == {"config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "a" / "tokenizer").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert set(convert(made.path, made.arguments, tmp_path / "b", vae=vae).parts) == {"text_encoder", "tokenizer"}
    assert set(convert(made.path, made.arguments, tmp_path / "c", text_encoder=text).parts) == {"vae"}


def test_parts_that_do_not_fit(reference: SimpleNamespace, tmp_path: Path) -> None:
    made = make(reference, tmp_path, VIDEO)
    for parts, message in (
        ({"vae": wan_folder(tmp_path / "vae", 16)}, "this VAE has 16 latent channels, the flow 48"),
        ({"text_encoder": t5_folder(tmp_path / "t5", 16)}, "this text encoder has width 16, the flow reads 24"),
        ({"vae": tmp_path / "nowhere"}, "nowhere: nothing to copy"),
        ({"text_encoder": tmp_path / "nowhere"}, "nowhere: nothing to copy"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(made.path, made.arguments, tmp_path / "out", **parts)
        assert not (tmp_path / "out").exists()


MEASURE = """
import json, re, sys
import torch
from reelflow.adapters.convert import convert

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

before = peak()
convert(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], max_shard_bytes=int(sys.argv[4]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_peak_memory_is_a_few_shards(reference: SimpleNamespace, tmp_path: Path) -> None:
    """Resident memory at its peak, pages of the mapped file included, above what importing takes: 600 MB in shards of 40."""
    arguments = reference.published[VIDEO] | {"channels": 448, "top_block_channels": 576}
    path, out, shard = tmp_path / "big.pth", tmp_path / "out", 40_000_000
    shapes = reference.shapes(reference.constructor(arguments, 2048))
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    size = path.stat().st_size
    assert size > 600_000_000
    command = [sys.executable, "-c", MEASURE, str(path), json.dumps(arguments), str(out), str(shard)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    path.unlink()
    shutil.rmtree(out)
    grown = int(result.stdout)
    assert grown < size / 4, f"{grown / 1e6:.0f} MB above the imports for a file of {size / 1e6:.0f} MB"
