"""Names and settings of the reference: the key set is a contract, settings that mean something else are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reelflow.adapters.checkpoint import load_into
from reelflow.adapters.names import flow_shapes, rename
from reelflow.adapters.reference import config_from_arguments, flow_config_from_constructor, read_arguments
from reelflow.config import DenoiserConfig, FlowConfig
from reelflow.flow.model import StarFlow

VIDEO, IMAGE = "starflow-v_7B_t2v_caus_480p", "starflow_3B_t2i_256x256"
TOTALS = {VIDEO: 6_890_096_528, IMAGE: 3_858_281_544}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_swiglu": True, "norm_type": "rms_norm", "use_bias": False, "use_post_norm": True, "use_qk_norm": True},
    {"num_heads": 4, "num_kv_heads": 2, "hf_style_rope": True},
    {"sos": False, "use_softplus": False, "soft_clip": 0},
    {"rope": False},
    {"txt_size": 0, "txt_dim": 0, "cond_top_only": False},
]


def small(**changes: Any) -> dict[str, Any]:
    """Constructor arguments of a small image model."""
    arguments = {
        "in_channels": 4,
        "img_size": 6,
        "patch_size": 1,
        "channels": 64,
        "num_blocks": 3,
        "layers_per_block": [1, 1, 2],
        "head_dim": 16,
        "rope": True,
        "sos": True,
        "txt_size": 5,
        "txt_dim": 24,
        "cond_top_only": True,
        "use_softplus": True,
        "use_final_norm": True,
        "soft_clip": 4.0,
        "seq_order": "L2R",
    }
    return arguments | changes


def renamed(shapes: dict[str, tuple[int, ...]], blocks: int) -> dict[str, tuple[int, ...]]:
    names = {key: rename(key, blocks) for key in shapes}
    return {name: shapes[key][2:] if name.endswith(".sos") else shapes[key] for key, name in names.items() if name}


@pytest.mark.parametrize("name", [VIDEO, IMAGE])
def test_published_key_sets(reference: SimpleNamespace, name: str) -> None:
    shapes = reference.shapes(reference.constructor(reference.published[name]))
    ours = renamed(shapes, 6)
    assert sum(math.prod(shape) for shape in ours.values()) == TOTALS[name]
    _, config = config_from_arguments(reference.published[name])
    assert ours == flow_shapes(config)
    with torch.device("meta"):
        assert ours == {key: tuple(tensor.shape) for key, tensor in StarFlow(config).state_dict().items()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_key_sets_of_every_option(reference: SimpleNamespace, options: dict[str, Any]) -> None:
    arguments = small(**options)
    config = flow_config_from_constructor(arguments)
    ours = renamed(reference.shapes(arguments), 3)
    assert ours == flow_shapes(config)
    with torch.device("meta"):
        assert ours == {key: tuple(tensor.shape) for key, tensor in StarFlow(config).state_dict().items()}


def test_a_name_for_every_place(reference: SimpleNamespace) -> None:
    shapes = reference.shapes(reference.constructor(reference.published[VIDEO]))
    names = [rename(key, 6) for key in shapes]
    kept = [name for name in names if name]
    assert len(kept) == len(set(kept))
    assert {name.split(".")[0] for name in kept} == {"shallow_blocks", "deep_block", "denoiser"}
    assert [key for key, name in zip(shapes, names, strict=True) if not name] == [
        *(f"blocks.{i}.attn_mask" for i in range(6)),
        "var",
        "feat_rope.freqs_cos",
        "feat_rope.freqs_sin",
    ]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("blocks.0.sos_embed", "shallow_blocks.0.sos"),
        ("blocks.5.proj_txt.bias", "deep_block.proj_text.bias"),
        ("blocks.4.attn_blocks.1.mlp.main.0.weight", "shallow_blocks.4.layers.1.mlp.up.weight"),
        ("blocks.5.attn_blocks.23.mlp.main.2.bias", "deep_block.layers.23.mlp.down.bias"),
        ("blocks.5.attn_blocks.3.mlp.gate_proj.weight", "deep_block.layers.3.mlp.gate.weight"),
        ("blocks.5.attn_blocks.3.mlp.down_proj.weight", "deep_block.layers.3.mlp.down.weight"),
        ("blocks.5.attn_blocks.3.attention.query_norm.weight", "deep_block.layers.3.attention.query_norm.weight"),
        ("blocks.1.pos_embed", "shallow_blocks.1.pos_embed"),
        ("learnable_self_denoiser.final_norm.weight", "denoiser.final_norm.weight"),
        ("feat_rope_gen.freqs", None),
    ],
)
def test_names(key: str, name: str | None) -> None:
    assert rename(key, 6) == name


@pytest.mark.parametrize("key", ["blocks.6.sos_embed", "module.blocks.0.sos_embed", "blocks.0.proj_in.scale", "head.weight", ""])
def test_unknown_names(key: str) -> None:
    with pytest.raises(ValueError, match="not a tensor of a STARFlow with 6 blocks"):
        rename(key, 6)


def test_published_video_settings(reference: SimpleNamespace) -> None:
    model, flow = config_from_arguments(reference.published[VIDEO], name=VIDEO)
    assert flow == FlowConfig(
        channels=48,
        width=3072,
        deep_width=4096,
        layers=(2, 2, 2, 2, 2, 24),
        window=21,
        text_tokens=256,
        text_dim=2048,
        position_span=32,
        noise_std=0.5,
        denoiser=DenoiserConfig(layers=8, width=3072, text=True, look_ahead=2, window=10),
    )
    assert (model.family, model.size, model.frames, model.fps) == ("starflow-v", 640, 81, 16)
    assert (model.latent_scale, model.guidance) == (0.6, 3.5)
    assert model.prompt.model_dump() == {"fps": True, "noise": True, "aspect": True}
    assert model.tasks == ("generate", "animate", "extend")
    assert model.parts == {
        "vae": "Wan-AI/Wan2.2-TI2V-5B-Diffusers:vae",
        "text_encoder": "google/flan-t5-xl",
        "tokenizer": "google/flan-t5-xl",
    }


def test_published_image_settings(reference: SimpleNamespace) -> None:
    model, flow = config_from_arguments(reference.published[IMAGE], name=IMAGE)
    assert flow == FlowConfig(
        channels=4,
        width=3072,
        deep_width=3072,
        layers=(2, 2, 2, 2, 2, 24),
        window=1,
        text_tokens=128,
        text_dim=2048,
        position_span=32,
        noise_std=0.3,
    )
    assert (model.family, model.size, model.frames) == ("starflow", 256, 1)
    assert (model.latent_scale, model.guidance) == (1.0, 3.6)
    assert model.prompt.model_dump() == {"fps": False, "noise": False, "aspect": False}
    assert model.tasks == ("generate",)
    assert model.parts["vae"] == "stabilityai/sd-vae-ft-ema"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adaln", 1),
        ("nvp", 0),
        ("noise_type", "uniform"),
        ("finetuned_vae", "px82zaheuu"),
        ("noise_embed_denoiser", 1),
        ("use_mm_attn", 1),
        ("use_pretrained_lm", "gemma2_2b"),
        ("local_attn_window", 5),
        ("seq_order", "R2L"),
        ("patch_size", 2),
        ("use_final_norm", 0),
        ("cond_top_only", 0),
        ("shallow_block_local", 0),
        ("temporal_causal", 0),
        ("layers_per_block", "2 2 2 0 2 24"),
        ("norm_type", "batch_norm"),
        ("vae", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        ("vae", "Wan-AI/Wan2.2-TI2V-5B-Diffusers:much"),
        ("text", "gemma"),
        ("vid_size", "80:16"),
        ("img_size", 650),
        ("num_kv_heads", 5),
        ("channels", 100),
        ("rope", 0),
        ("nonsense", 1),
        ("model_type", "TarFlow_XL_1"),
    ],
)
def test_settings_not_offered_name_key_and_value(reference: SimpleNamespace, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"file\.yaml: ") as error:
        config_from_arguments({**reference.published[VIDEO], key: value}, source="file.yaml")
    text = str(error.value)
    assert "\n" not in text
    assert key in text
    assert str(value) in text


@pytest.mark.parametrize("key", ["seq_order", "patch_size", "use_final_norm", "vae"])
def test_the_reference_defaults_apply_to_absent_keys(reference: SimpleNamespace, key: str) -> None:
    arguments = {name: value for name, value in reference.published[VIDEO].items() if name != key}
    with pytest.raises(ValueError, match=key):
        config_from_arguments(arguments)


def test_training_keys_are_left_out(reference: SimpleNamespace) -> None:
    changed = {**reference.published[VIDEO], "lr": 1, "epochs": 3, "fsdp": 0, "cfg": [1, 2], "data": "/data", "sample_freq": 7}
    assert config_from_arguments(changed) == config_from_arguments(reference.published[VIDEO])


def test_editing_models_say_so(reference: SimpleNamespace) -> None:
    model, _ = config_from_arguments({**reference.published[VIDEO], "video_to_video": 1})
    assert model.tasks == ("generate", "animate", "extend", "edit")


def test_constructor_defaults() -> None:
    bare = {key: value for key, value in small().items() if key not in ("sos", "use_softplus", "soft_clip", "rope")}
    config = flow_config_from_constructor(bare)
    assert (config.sos, config.scale, config.soft_clip) == (False, "exp", 0)
    assert (config.positions, config.learned_places) == ("learned", 36)
    assert flow_config_from_constructor(small(layers_per_block=[2])).layers == (2, 2, 2)
    assert flow_config_from_constructor(small(hf_style_rope=True)).positions == "rotary_half"
    with pytest.raises(ValueError, match="layers_per_block"):
        flow_config_from_constructor(small(layers_per_block=[1, 2]))
    with pytest.raises(ValueError, match="use_adaln"):
        flow_config_from_constructor(small(use_adaln=False))


def test_yaml_files(reference: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("arguments:\n" + "".join(f"- {key}: {json.dumps(value)}\n" for key, value in reference.published[VIDEO].items()))
    assert config_from_arguments(read_arguments(path)) == config_from_arguments(reference.published[VIDEO])
    for text in ("", "arguments: 3", "[1, 2]", "arguments: [a, b]", "a: [", "\x00"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"model\.yaml: not a reference configuration") as error:
            read_arguments(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not a reference configuration"):
        read_arguments(tmp_path / "missing.yaml")


@pytest.mark.parametrize("name", ["starflow_image_mini", "starflow_v_mini"])
@torch.no_grad()
def test_golden_state_dicts_load_and_compute(golden: Path, name: str) -> None:
    about = json.loads((golden / name / f"{name}.json").read_text())
    tensors = load_file(golden / name / f"{name}.safetensors")
    config = flow_config_from_constructor(about["reference_arguments"], window=about.get("latent_frames", 1))
    state = {}
    for key, tensor in tensors.items():
        if key.startswith("model.") and (ours := rename(key.removeprefix("model."), len(config.layers))):
            state[ours] = tensor.reshape(-1) if ours.endswith(".sos") else tensor
    with torch.device("meta"):
        flow = StarFlow(config)
    load_into(flow, state, finite=True)
    x = tensors["in.x"] if about["kind"] == "video" else tensors["in.x"][:, None]
    out = flow(x, tensors["in.text"])
    torch.testing.assert_close(out.z.view_as(tensors["out.z"]), tensors["out.z"], atol=2e-4, rtol=0)
