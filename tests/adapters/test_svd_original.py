"""Original single files: the whole key sets at full size, and the same numbers at tiny width."""

from __future__ import annotations

import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from reelflow.adapters import svd_names
from reelflow.adapters.svd import Parts, load_parts, trained_frames
from reelflow.pipelines.svd.decoder import Decoder, Encoder
from reelflow.pipelines.svd.unet import Denoiser

original = runpy.run_path(str(Path(__file__).with_name("svd_original.py")))
tiny = runpy.run_path(str(Path(__file__).parent.parent / "pipelines" / "svd_tiny.py"))
WIDTHS, STATES, FRAMES = (32, 64, 96, 96), 24, 2
UNUSED = (
    "conditioner.embedders.0.open_clip.model.logit_scale",
    "conditioner.embedders.0.open_clip.model.transformer.resblocks.0.ln_1.weight",
    "conditioner.embedders.3.encoder.post_quant_conv.weight",
    "conditioner.embedders.3.encoder.decoder.conv_in.weight",
    "first_stage_model.encoder.conv_in.weight",
)


def keys(layers: int, temporal: bool = True) -> list[str]:
    quant = [f"{original['ENCODER']}quant_conv.{kind}" for kind in ("weight", "bias")]
    quant += [] if temporal else [f"first_stage_model.post_quant_conv.{kind}" for kind in ("weight", "bias")]
    return [
        *(original["UNET"] + key for key in original["unet_keys"]()),
        *(original["DECODER"] + key for key in original["decoder_keys"](temporal)),
        *(f"{original['ENCODER']}encoder.{key}" for key in original["encoder_keys"]()),
        *quant,
        *(original["CLIP"] + key for key in original["clip_keys"](layers)),
    ]


@pytest.mark.parametrize("temporal", [True, False])
def test_every_key_of_the_released_files_has_its_place(temporal: bool) -> None:
    state = {key: torch.zeros(3, 3) for key in (*keys(32, temporal), *UNUSED)}
    parts, unknown = svd_names.convert(state)
    shape: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "latent_channels": 4,
    }
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20))
        vae = AutoencoderKLTemporalDecoder(**shape) if temporal else AutoencoderKL(**shape, up_block_types=("UpDecoderBlock2D",) * 4)
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(num_hidden_layers=32))
    assert unknown == []
    for part, module, count in (("unet", unet, 1428), ("vae", vae, 374 if temporal else 248), ("image_encoder", clip, 520)):
        assert parts[part].keys() == module.state_dict().keys(), part
        assert len(parts[part]) == count


def test_keys_of_nothing_are_named() -> None:
    for key in (
        "model.diffusion_model.input_blocks.1.0.surplus.weight",
        "model_ema.decay",
        "first_stage_model.decoder.up.0.attn.0.q.weight",
        "conditioner.embedders.0.open_clip.model.visual.head.weight",
        "denoiser.sigmas",
    ):
        assert svd_names.convert({key: torch.zeros(1)})[1] == [key]


def modules(temporal: bool) -> dict[str, Any]:
    """Tiny, random, in diffusers' classes."""
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=WIDTHS,
        num_attention_heads=(1, 1, 1, 1),
        cross_attention_dim=STATES,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
    )
    shape: dict[str, Any] = {
        "block_out_channels": WIDTHS,
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "latent_channels": 4,
    }
    vae = AutoencoderKLTemporalDecoder(**shape) if temporal else AutoencoderKL(**shape, up_block_types=("UpDecoderBlock2D",) * 4)
    config = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=56,
        projection_dim=STATES,
        hidden_act="gelu",
    )
    built = {"unet": unet, "vae": vae, "image_encoder": CLIPVisionModelWithProjection(config)}
    return {part: tiny["spread"](module, seed) for seed, (part, module) in enumerate(built.items())}


@cache
def original_state(temporal: bool = True) -> dict[str, Tensor]:
    """The tiny modules in a file's names."""
    held = {part: module.state_dict() for part, module in modules(temporal).items()}
    state = {key: torch.zeros(2) for key in UNUSED}
    for key in keys(2, temporal):
        part, names = svd_names.places(key, temporal)
        value = torch.cat([held[part][name] for name, _ in names])
        if key.endswith("visual.proj"):
            value = value.t()
        elif re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key):
            value = value[..., None, None]
        state[key] = value.clone().contiguous()
    return state


@pytest.fixture(scope="module", params=[True, False], ids=["temporal decoder", "image decoder"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Parts]:
    path = tmp_path_factory.mktemp("file") / ("svd_xt.safetensors" if request.param else "svd_xt_image_decoder.safetensors")
    save_file(original_state(request.param), path)
    parts = load_parts(path)
    return {key: tensor.double() for key, tensor in load_file(path).items()}, parts


def under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


@torch.no_grad()
def test_the_unet_gives_the_originals_values(loaded: tuple[dict[str, Tensor], Parts]) -> None:
    """With Stability's norms, in float64, both rows of guidance."""
    state, parts = loaded
    latents, picture, states = torch.randn(1, FRAMES, 4, 8, 16).double(), torch.randn(1, 4, 8, 16).double(), torch.randn(1, STATES).double()
    ids, time = [6.0, 127.0, 0.02], torch.tensor([1.25])
    denoiser = Denoiser(parts.unet.double())
    conditions = denoiser.conditions(picture, states, ids, time, FRAMES, True, 1e-5)
    ours = denoiser(latents, conditions, torch.zeros(1, dtype=torch.long))[0]
    shown = torch.cat((torch.zeros_like(picture), picture)).repeat_interleave(FRAMES, 0)
    context = torch.cat((torch.zeros_like(states), states)).repeat_interleave(FRAMES, 0)[:, None]
    x = torch.cat((latents[0].repeat(2, 1, 1, 1), shown), 1)
    count = len(x)
    theirs = original["unet"](under(state, original["UNET"]), x, time.expand(count), context, torch.tensor([ids]).expand(count, 3), FRAMES)
    assert theirs.std() > 0.05
    assert (ours.flatten(0, 1) - theirs).abs().max() < 1e-10


@torch.no_grad()
def test_the_vae_gives_the_originals_values(loaded: tuple[dict[str, Tensor], Parts]) -> None:
    state, parts = loaded
    parts.vae.double()
    z, pixels = torch.randn(FRAMES, 4, 4, 8).double(), torch.rand(1, 3, 32, 64).double() * 2 - 1
    decoder = under(state, original["DECODER"])
    post = under(state, "first_stage_model.post_quant_conv.")
    seen = torch.nn.functional.conv2d(z, post["weight"], post["bias"]) if post else z
    theirs = original["decode"](decoder, seen, FRAMES)
    assert theirs.std() > 0.05
    assert (Decoder(parts.vae)(z[None] * parts.vae.config.scaling_factor)[0] - theirs).abs().max() < 1e-6
    moments = original["encode"](under(state, f"{original['ENCODER']}encoder."), pixels)
    quant = under(state, f"{original['ENCODER']}quant_conv.")
    mode = torch.nn.functional.conv2d(moments, quant["weight"], quant["bias"])[:, :4]
    assert (Encoder(parts.vae)(pixels) - mode).abs().max() < 1e-10


@torch.no_grad()
def test_clip_gives_the_originals_values(loaded: tuple[dict[str, Tensor], Parts]) -> None:
    state, parts = loaded
    view = torch.randn(2, 3, 224, 224).double()
    theirs = original["clip"](under(state, original["CLIP"]), view, heads=2)
    assert theirs.std() > 0.05
    assert (parts.image_encoder.double()(view).image_embeds - theirs).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("name", "frames"), [("svd", 14), ("svd_xt", 25), ("svd-xt-1.1", 25), ("svd_xt_image_decoder", 25), ("texture", 14)]
)
def test_the_name_tells_the_trained_length(name: str, frames: int) -> None:
    assert trained_frames(Path(f"{name}.safetensors")) == frames


@pytest.mark.parametrize("change", ["missing", "extra", "misshaped", "nan", "unknown"])
def test_a_file_that_is_not_whole(change: str, tmp_path: Path) -> None:
    state = dict(original_state())
    key = f"{original['UNET']}middle_block.1.proj_in.bias"
    if change == "missing":
        del state[key]
    elif change in ("extra", "unknown"):
        state[f"{original['UNET']}middle_block.{1 if change == 'extra' else 7}.surplus"] = torch.zeros(1)
    else:
        state[key] = torch.zeros(7) if change == "misshaped" else torch.full_like(state[key], torch.nan)
    save_file(state, tmp_path / "svd.safetensors")
    expected = {
        "missing": r"1 missing \(mid_block.attentions.0.proj_in.bias\)",
        "extra": r"1 extra \(mid_block.attentions.0.surplus\)",
        "misshaped": r"1 misshaped \(mid_block",
        "nan": "1 tensors hold NaN or infinity",
        "unknown": r"1 tensors that Stable Video Diffusion does not have \(model.diffusion_model.middle_block.7.surplus\)",
    }[change]
    with pytest.raises(ValueError, match=expected) as error:
        load_parts(tmp_path / "svd.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("conditioner.embedders.1.model.ln_final.weight", "SDXL"),
        ("cond_stage_model.transformer.text_model.embeddings.position_ids", "Stable Diffusion 1"),
        ("deep_block.sos", "a STARFlow"),
        ("cond_stage_model.model.ln_final.weight", "Stable Diffusion 2"),
        ("unet.down_blocks.0.lora_A.weight", "a LoRA"),
        ("down_blocks.0.resnets.0.norm1.weight", "a UNet in diffusers' names"),
        ("w", "of a kind not known here"),
    ],
)
def test_files_of_other_families_are_named(key: str, family: str, tmp_path: Path) -> None:
    path = tmp_path / "svd.safetensors"
    save_file({key: torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=f"svd.safetensors: {family}.*, not Stable Video Diffusion; give svd.safetensors"):
        load_parts(path)
