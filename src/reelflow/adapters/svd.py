"""Stable Video Diffusion from disk: a diffusers folder, or one of the original single files; strictly.

A folder holds `model_index.json`, `unet/`, `vae/`, `image_encoder/` and `scheduler/`, as on Hugging Face; files of the
variant fp16 serve too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelflow.adapters import svd_names
from reelflow.adapters.checkpoint import few, load_into, read_weights, require_finite
from reelflow.adapters.hub import licence_notice
from reelflow.config import ModelConfig

PIPELINE = "StableVideoDiffusionPipeline"
LICENCE = "stable-video-diffusion-community"
FRAMES = {"svd": 14, "svd-xt": 25}
"""Trained length of the released models, which have the same tensors."""
SCHEDULER = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction", "interpolation_type": "linear", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0,
    "timestep_spacing": "leading", "timestep_type": "continuous", "steps_offset": 1,
}  # fmt: skip
"""Of the released models; the single files do not say."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_FAMILIES = (
    ("double_blocks.", "Flux or HunyuanVideo"), ("deep_block.", "a STARFlow"), ("lora", "a LoRA"),
    ("patch_embedding.", "Wan"), ("transformer_blocks.0.attn", "a diffusion transformer"),
    ("conditioner.embedders.1.model.", "SDXL"), ("cond_stage_model.transformer.", "Stable Diffusion 1"),
    ("cond_stage_model.model.", "Stable Diffusion 2"), ("motion_modules.", "an AnimateDiff motion module"),
    ("down_blocks.0.resnets.0.", "a UNet in diffusers' names (give the folder of the whole pipeline)"),
    ("model.diffusion_model.input_blocks.", "an image model of the Stable Diffusion family"),
    ("encoder.down", "a VAE"),
)  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """diffusers' and transformers' modules of one model, for evaluation, with the mean and deviation of CLIP's pictures."""

    about: ModelConfig
    unet: Any
    vae: Any
    image_encoder: Any
    scheduler: Any
    clip_mean: tuple[float, ...] = CLIP_MEAN
    clip_std: tuple[float, ...] = CLIP_STD


def is_svd(place: Path) -> bool:
    """Whether a folder or file is for this family to read, or to say what it is instead."""
    if place.is_file():
        return place.suffix == ".safetensors"
    return (place / "model_index.json").is_file()


def load_parts(place: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Parts:
    """Load a folder or an original file. The VAE's encoder, which overflows in half precision, is float32 always.

    Raises:
        ValueError: another family (says which), a part that is missing, tensors missing, extra, misshaped or not finite.
    """
    place = Path(place)
    return _from_folder(place, device, dtype) if place.is_dir() else _from_file(place, device, dtype)


def load_part(folder: Path, part: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """One module, for evaluation, from its own folder. part: `unet`, `vae` or `image_encoder`. Raises ValueError as `load_parts`."""
    from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionConfig

    config = _json(folder / "config.json")
    try:
        if part == "image_encoder":
            module = _image_encoder(CLIPVisionConfig.from_dict(config))
        else:
            kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderKLTemporalDecoder": AutoencoderKLTemporalDecoder}
            with torch.device("meta"):
                module = (UNetSpatioTemporalConditionModel if part == "unet" else kinds[config.get("_class_name", "")]).from_config(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: a configuration of its parts cannot be used ({error})") from None
    stem = "model" if part == "image_encoder" else "diffusion_pytorch_model"
    _fill(module, part_weights(folder, stem, dtype != torch.float32), str(folder), device, dtype, part)
    return module


def _from_folder(folder: Path, device: str | torch.device, dtype: torch.dtype) -> Parts:
    about = read_about(folder)
    for part in ("unet", "vae", "image_encoder"):
        _json(folder / part / "config.json")  # what is missing is said before anything large is read
    scheduler = open_scheduler(folder)
    mean, std = clip_norm(folder)
    unet, vae, image_encoder = (load_part(folder / part, part, device, dtype) for part in ("unet", "vae", "image_encoder"))
    return Parts(about, unet, vae, image_encoder, scheduler, mean, std)


def open_scheduler(folder: Path) -> Any:
    """diffusers' scheduler of a folder. Raises ValueError where it cannot be used, or predicts something else than v."""
    from diffusers import EulerDiscreteScheduler

    steps = _json(folder / "scheduler" / "scheduler_config.json")
    try:
        scheduler = EulerDiscreteScheduler.from_config(steps)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: a configuration of its parts cannot be used ({error})") from None
    if scheduler.config.prediction_type != "v_prediction":
        kind = scheduler.config.prediction_type
        raise ValueError(f"{folder}: its scheduler predicts {kind}; Stable Video Diffusion's predicts v (v_prediction)")
    return scheduler


def clip_norm(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the pictures that a folder's CLIP sees."""
    normal = folder / "feature_extractor" / "preprocessor_config.json"
    values = _json(normal) if normal.is_file() else {}
    mean, std = (tuple(values.get(f"image_{what}", default)) for what, default in (("mean", CLIP_MEAN), ("std", CLIP_STD)))
    return mean, std


def _from_file(path: Path, device: str | torch.device, dtype: torch.dtype) -> Parts:
    from diffusers import EulerDiscreteScheduler

    state = read_weights(path)
    parts, unknown = svd_names.convert(require_family(state, path))
    unet, vae, image_encoder = modules_for(state, parts, trained_frames(path))
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} tensors that Stable Video Diffusion does not have ({few(unknown)})")
    for part, module in (("unet", unet), ("vae", vae), ("image_encoder", image_encoder)):
        _fill(module, parts[part], f"{path}, {part}", device, dtype, part)
    return Parts(_about(path.stem, unet.config, True), unet, vae, image_encoder, EulerDiscreteScheduler(**SCHEDULER))


def require_family(state: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
    """Raise ValueError for a file of another family, and say which it is."""
    prefix = svd_names.UNET
    if f"{prefix}input_blocks.1.0.time_stack.in_layers.0.weight" in state:
        conditions = state[f"{prefix}label_emb.0.0.weight"].shape[1] if f"{prefix}label_emb.0.0.weight" in state else 0
        if conditions % 3 == 0:
            return state
        raise ValueError(f"{path}: SV3D, which turns around an object; give a Stable Video Diffusion model (svd, svd_xt)")
    names = list(state)
    found = next((family for mark, family in _FAMILIES if any(mark in name.lower() for name in names)), "of a kind not known here")
    raise ValueError(f"{path}: {found}, not Stable Video Diffusion; give svd.safetensors or svd_xt.safetensors, or another family's folder")


def modules_for(state: Mapping[str, Tensor], parts: Mapping[str, Mapping[str, Tensor]], frames: int) -> tuple[Any, Any, Any]:
    """UNet, VAE and CLIP on `meta`, with the sizes that the tensors of an original file have.

    Raises ValueError where a tensor that tells a size is missing.
    """
    from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionConfig

    def side(part: str, name: str, axis: int = 0) -> int:
        if name not in parts[part]:
            raise ValueError(f"{getattr(state, 'source', 'the file')}: incomplete, the {part} has no {name}; download it again")
        return parts[part][name].shape[axis]

    widths = tuple(side("unet", f"down_blocks.{i}.resnets.0.spatial_res_block.conv1.weight") for i in range(4))
    conditions = side("unet", "add_embedding.linear_1.weight", 1)
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(
            sample_size=96, in_channels=side("unet", "conv_in.weight", 1), out_channels=side("unet", "conv_out.weight"),
            block_out_channels=widths, num_attention_heads=tuple(max(1, width // 64) for width in widths),
            cross_attention_dim=side("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1),
            addition_time_embed_dim=conditions // 3, projection_class_embeddings_input_dim=conditions, num_frames=frames,
        )  # fmt: skip
        shape: dict[str, Any] = {
            "block_out_channels": tuple(side("vae", f"encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in range(4)),
            "layers_per_block": 2, "latent_channels": side("vae", "decoder.conv_in.weight", 1), "sample_size": 768,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
        }  # fmt: skip
        temporal = "decoder.time_conv_out.weight" in parts["vae"]
        plain = shape | {"up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKLTemporalDecoder(**shape) if temporal else AutoencoderKL(**plain)
    width, patch = (side("image_encoder", "vision_model.embeddings.patch_embedding.weight", axis) for axis in (0, 2))
    places = side("image_encoder", "vision_model.embeddings.position_embedding.weight") - 1
    layers = sum(name.endswith("layer_norm1.weight") for name in parts["image_encoder"])
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=side("image_encoder", "vision_model.encoder.layers.0.mlp.fc1.weight"),
        num_hidden_layers=layers, num_attention_heads=max(1, width // 80), patch_size=patch, image_size=round(places**0.5) * patch,
        projection_dim=side("image_encoder", "visual_projection.weight"), hidden_act="gelu",
    )  # fmt: skip
    return unet, vae, _image_encoder(config)


def _image_encoder(config: Any) -> Any:
    """CLIP's picture tower on `meta`, but for the buffer that no file holds."""
    from transformers import CLIPVisionModelWithProjection

    with torch.device("meta"):
        module = CLIPVisionModelWithProjection(config)
    embeddings = module.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    return module


def _fill(module: nn.Module, weights: Mapping[str, Tensor], source: str, device: Any, dtype: torch.dtype, part: str) -> None:
    """Give a `meta` module its values; the VAE's encoder in float32."""
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
    if part == "vae":
        weights = {name: t.float() if name.startswith(("encoder.", "quant_conv.")) else t.to(dtype) for name, t in weights.items()}
    try:
        load_into(module, weights, device, None if part == "vae" else dtype)
    except ValueError as error:
        raise ValueError(f"{source}: {str(error).removeprefix('weights: ')}") from None
    require_finite(module.state_dict(), source)
    module.to(device)
    module.eval().requires_grad_(False)


def part_weights(folder: Path, stem: str, half: bool = False) -> Mapping[str, Tensor]:
    """The weights of a part: of the variant fp16 where that is enough, or all there is."""
    stems = [f"{stem}.fp16", stem] if half else [stem, f"{stem}.fp16"]
    held = [name for name in stems if any(folder.glob(f"{name}.safetensors*"))]
    return read_weights(folder, (held or [stem])[0])


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; the folder of a {PIPELINE} has unet, vae, image_encoder and scheduler") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not a configuration")
    return values


def _hub_id(folder: Path) -> str:
    """The name of a repository in the cache of huggingface_hub, else the folder's."""
    cached = next((part for part in folder.parts if part.startswith("models--")), "")
    return cached.removeprefix("models--").replace("--", "/") or folder.name


def trained_frames(path: Path) -> int:
    """Trained length by the file's name: the tensors of svd and svd_xt are alike."""
    return FRAMES["svd-xt" if "xt" in path.stem.lower().replace("-", "_").split("_") else "svd"]


def read_about(folder: Path) -> ModelConfig:
    """What the model of a folder is: its own `config.json`, else what the UNet's tells. Raises ValueError for another family's."""
    kind = _json(folder / "model_index.json").get("_class_name")
    if kind != PIPELINE:
        raise ValueError(f"{folder}: a {kind}, not Stable Video Diffusion; give the folder of a {PIPELINE}")
    if (folder / "config.json").is_file():
        return ModelConfig.read(folder / "config.json")
    name = _hub_id(folder)
    return _about(name, _json(folder / "unet" / "config.json"), licence_notice(name) is not None)


def _about(name: str, unet: Mapping[str, Any], released: bool) -> ModelConfig:
    size = unet.get("sample_size") or 96
    side = round((size[0] * size[1]) ** 0.5) if isinstance(size, list | tuple) else size
    return ModelConfig.parse({
        "family": "svd", "name": name, "licence": LICENCE if released else "unknown", "size": 8 * side, "fps": 7, "guidance": 3.0,
        "frames": unet.get("num_frames", 25), "tasks": ("generate", "animate", "extend"),
    })  # fmt: skip
