"""The reference's settings in ours: YAML arguments and constructor arguments.

Source of the facts: apple/ml-starflow (`train.py` for the YAML's keys and defaults, `transformer_flow.py` for the
constructor's), arXiv 2506.06276 and 2511.20462. What is computed differently there and not offered here is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import field_validator

from reelflow.config import FlowConfig, ModelConfig, PromptConfig, Strict


class _Constructor(Strict):
    """Arguments of the reference's `Model`, with its defaults."""

    in_channels: int
    img_size: int
    patch_size: int
    channels: int
    num_blocks: int
    layers_per_block: tuple[int, ...]
    head_dim: int = 64
    num_heads: int | None = None
    num_kv_heads: int | None = None
    rope: bool = False
    pt_seq_len: int | None = None
    sos: bool = False
    txt_size: int = 0
    txt_dim: int = 0
    cond_top_only: bool = False
    use_softplus: bool = False
    use_swiglu: bool = False
    use_bias: bool = True
    use_qk_norm: bool = False
    use_post_norm: bool = False
    use_final_norm: bool = False
    hf_style_rope: bool = False
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    use_checkpoint: int = 0
    use_checkpoint_mlp: int | None = None
    use_pretrained_lm: str | None = None
    use_mm_attn: bool = False
    soft_clip: float = 0
    seq_order: str = "R2L"
    learnable_self_denoiser: bool = False
    conditional_denoiser: bool = False
    temporal_causal: int = 0
    top_block_channels: int | None = None
    shallow_block_local: bool = False
    denoiser_window: int | None = None
    local_attn_window: int | None = None

    @field_validator("layers_per_block", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """`2 2 2 2 2 24` in a YAML file, a list in code, one number for all blocks."""
        return value.split() if isinstance(value, str) else [value] if isinstance(value, int) else value

    def refused(self, video: bool) -> Iterator[tuple[str, str]]:
        """Settings that compute something else than this package, each with the reason."""
        if self.patch_size != 1:
            yield "patch_size", "only patches of one latent place are offered"
        if self.seq_order != "L2R":
            yield "seq_order", "only L2R (even blocks reversed) is offered"
        if not self.use_final_norm:
            yield "use_final_norm", "models without the final norm are not offered"
        if self.use_mm_attn:
            yield "use_mm_attn", "only text in front of one sequence is offered"
        if self.use_pretrained_lm:
            yield "use_pretrained_lm", "language models as deep block are not offered"
        if self.local_attn_window:
            yield "local_attn_window", "windowed attention in the flow blocks is not offered (it is no setting of sampling here)"
        if self.txt_dim and not self.cond_top_only:
            yield "cond_top_only", "text in the shallow blocks is not offered"
        if video and not self.shallow_block_local:
            yield "shallow_block_local", "video models have shallow blocks inside a frame"
        if video and not self.temporal_causal:
            yield "temporal_causal", "a video's token order must keep the order of frames"
        if not all(self.layers_per_block):
            yield "layers_per_block", "blocks without layers are not offered"
        if len(self.layers_per_block) not in (1, self.num_blocks):
            yield "layers_per_block", f"must name one number or one for each of the {self.num_blocks} blocks"
        if self.learnable_self_denoiser and not self.rope:
            yield "rope", "a denoiser without positions is not offered"


def flow_config_from_constructor(
    arguments: Mapping[str, Any], *, noise_std: float = 0.3, window: int = 1, source: str = "reference_arguments"
) -> FlowConfig:
    """Our configuration of a model given by the reference's constructor arguments (the `reference_arguments` of a golden folder).

    Args:
        noise_std: σ of the data noise, which the constructor does not know.
        window: trained length in latent frames (1 for images), likewise.

    Raises:
        ValueError: an unknown argument, or a setting not offered here; names the key, its value and the reason.
    """
    values = _Constructor.parse(dict(arguments), source)
    for key, reason in values.refused(video=window > 1 or values.temporal_causal > 0):
        raise ValueError(f"{source}: {key} = {arguments.get(key, getattr(values, key))!r}: {reason}")
    layers = values.layers_per_block * values.num_blocks if len(values.layers_per_block) == 1 else values.layers_per_block
    denoiser = {
        "width": values.channels,
        "text": values.conditional_denoiser and values.txt_dim > 0,
        "look_ahead": max(values.temporal_causal, 1),
        "window": values.denoiser_window if values.temporal_causal else None,
    }
    flow = {
        "channels": values.in_channels,
        "width": values.channels,
        "deep_width": values.top_block_channels or values.channels,
        "layers": layers,
        "head_dim": values.head_dim,
        "num_heads": values.num_heads,
        "num_kv_heads": values.num_kv_heads,
        "window": window,
        "text_tokens": values.txt_size,
        "text_dim": values.txt_dim,
        "position_span": values.pt_seq_len or values.img_size,
        "positions": ("rotary_half" if values.hf_style_rope else "rotary") if values.rope else "learned",
        "learned_places": None if values.rope else values.img_size**2,
        "sos": values.sos,
        "scale": "softplus" if values.use_softplus else "exp",
        "soft_clip": values.soft_clip,
        "norm": values.norm_type.removesuffix("_norm"),
        "mlp": "swiglu" if values.use_swiglu else "gelu",
        "qk_norm": values.use_qk_norm,
        "post_norm": values.use_post_norm,
        "bias": values.use_bias,
        "noise_std": noise_std,
        "denoiser": denoiser if values.learnable_self_denoiser else None,
    }
    return FlowConfig.parse(flow, source)


_DEFAULTS = {"img_size": 32, "channel_size": 3, "patch_size": 4, "channels": 512, "blocks": 4, "layers_per_block": 8}
_RENAMED = {"channel_size": "in_channels", "blocks": "num_blocks"}
_MUST_BE = {"adaln": (0,), "nvp": (1,), "noise_type": ("gaussian",), "noise_embed_denoiser": (0,), "finetuned_vae": (None, "none")}
_MODEL = """noise_std cond_noise_level fps_cond mix_aspect vid_size vae text video_to_video"""
"""Keys read here; all others that matter are the constructor's."""
_TRAINING = """
    train_seed data logdir dataset wds no_flip caption_column secondary_dataset secondary_img_size secondary_vid_size
    vae_decoder_factor batch_size secondary_batch_size secondary_ratio acc fp8 use_8bit_adam epochs epoch_length lr min_lr
    drop_label drop_image last_frame_cond resume_path resume_epoch warmup_steps fsdp fsdp_text_encoder gradient_checkpoint
    gradient_checkpoint_mlp compile latent_norm_regularization loss_scaling grad_clip grad_skip dry_run wandb_name save_every
    sample_freq cfg num_samples sample_batch_size
"""
"""Keys that change how a model is trained or logged, not what it computes. Its `cfg` is a guidance used while training."""
_TEXT_WIDTHS = {
    "google/flan-t5-small": 512,
    "google/flan-t5-base": 768,
    "google/flan-t5-large": 1024,
    "google/flan-t5-xl": 2048,
    "google/flan-t5-xxl": 4096,
}


def read_arguments(path: str | Path) -> dict[str, Any]:
    """The `arguments:` list of a reference YAML file as one dictionary. Raises ValueError where it is none."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return {key: value for entry in values["arguments"] for key, value in entry.items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{path}: not a reference configuration with a list of arguments ({type(error).__name__} {reason})") from None


def config_from_arguments(
    arguments: Mapping[str, Any], *, name: str = "starflow", text_dim: int | None = None, source: str = "arguments"
) -> tuple[ModelConfig, FlowConfig]:
    """Our configuration of a model given by the arguments of a reference YAML file.

    Args:
        arguments: key → value as in the YAML; training-only keys are accepted and left out.
        name: name of the model.
        text_dim: width of the text encoder; None: known from its name.

    Raises:
        ValueError: an unknown key, or a setting not offered here; names the key, its value and the reason.
    """
    values = {**_DEFAULTS, **arguments}
    for key, allowed in _MUST_BE.items():
        if values.pop(key, allowed[0]) not in allowed:
            raise ValueError(f"{source}: {key} = {arguments[key]!r} is not offered; only {allowed[0]!r}")
    ours = {key: values.pop(key, None) for key in _MODEL.split()}
    vae, factor, latent_scale = _vae(ours["vae"], source)
    frames, fps = _video_size(ours["vid_size"], source)
    side = _side(values["img_size"], factor, source)
    model = {_RENAMED.get(key, key): value for key, value in values.items() if key not in _TRAINING.split()} | {"img_size": side // factor}
    split = _Constructor._split(model["layers_per_block"])
    model["num_blocks"] = len(split) if len(split) > 1 else model["num_blocks"]
    text = str(ours["text"]) if ours["text"] and values.get("txt_size") else None
    if text and text_dim is None and text not in _TEXT_WIDTHS:
        raise ValueError(f"{source}: text = {text!r}: not a known text encoder; known are {', '.join(_TEXT_WIDTHS)}")
    model["txt_dim"] = (text_dim or _TEXT_WIDTHS[text]) if text else 0
    video = frames > 1
    noise_std = 0.3 if ours["noise_std"] is None else ours["noise_std"]
    flow = flow_config_from_constructor(model, noise_std=noise_std, window=1 + (frames - 1) // 4 if video else 1, source=source)
    tasks = ("generate", "animate", "extend", *(("edit",) if ours["video_to_video"] else ())) if video else ("generate",)
    config = {
        "family": "starflow-v" if video else "starflow",
        "name": name,
        "size": side,
        "frames": frames,
        "fps": fps,
        "latent_scale": latent_scale,
        "guidance": 3.5 if video else 3.6,
        "tasks": tasks,
        "prompt": PromptConfig(fps=bool(ours["fps_cond"]), noise=bool(ours["cond_noise_level"]), aspect=bool(ours["mix_aspect"])),
        "parts": {"vae": vae} | ({"text_encoder": text, "tokenizer": text} if text else {}),
    }
    return ModelConfig.parse(config, source), flow


def _vae(value: Any, source: str) -> tuple[str, int, float]:
    """Hugging Face place, pixels per latent place and latent scale of the `vae` argument (`org/name` or `org/name:scale`)."""
    name, _, scale = str(value).partition(":")
    try:
        if "Wan-AI/Wan2.2" in name:
            return f"{name}:vae", 16, float(scale or 1)
        if "sd-vae" in name and not scale:
            return name, 8, 1.0
    except ValueError:
        pass
    raise ValueError(f"{source}: vae = {value!r}: offered are Wan-AI/Wan2.2-TI2V-5B-Diffusers:SCALE and stabilityai/sd-vae-ft-…")


def _video_size(value: Any, source: str) -> tuple[int, float]:
    """Frames and rate of `vid_size` (`frames:fps`, further rates ignored); one frame where it is not given."""
    if value is None:
        return 1, 16.0
    match = re.fullmatch(r"(\d+):(\d+)(:\d+)*", str(value))
    if not match or int(match[1]) % 4 != 1:
        raise ValueError(f"{source}: vid_size = {value!r}: expected 'FRAMES:FPS' in quotes with 1 + 4k frames, for example '81:16'")
    return int(match[1]), float(match[2])


def _side(value: Any, factor: int, source: str) -> int:
    if not isinstance(value, int) or value < factor or value % factor:
        raise ValueError(f"{source}: img_size = {value!r}: must be a multiple of the VAE's {factor} pixels")
    return value
