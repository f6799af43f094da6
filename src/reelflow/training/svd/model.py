"""The parts of a Stable Video Diffusion that is trained: opened, or made new as a configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from reelflow.adapters.hub import resolve
from reelflow.adapters.svd import load_part
from reelflow.training.svd.config import SvdConfig

TOWER = "image_encoder"


class Codec(NamedTuple):
    """What training has to know of the VAE."""

    channels: int
    factor: int
    """Pixels per latent place, in each direction."""
    scaling: float
    """Latents are multiplied by it; the picture's are not."""


def codec_of(config: SvdConfig) -> Codec:
    """Of `vae`. Raises ValueError where there is none, or its places do not fit `about.size`."""
    path = config.vae / "config.json"
    if not path.is_file():
        raise ValueError(f"{config.vae}: no VAE here; train one with: python -m reelflow.training.svd.vae FOLDER --export {config.vae}")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        found = Codec(said["latent_channels"], 2 ** (len(said["block_out_channels"]) - 1), said["scaling_factor"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not the configuration of a VAE of Stable Video Diffusion") from None
    if config.about.size % found.factor:
        raise ValueError(f"about.size = {config.about.size}: no multiple of the {found.factor} pixels of a latent place")
    return found


def open_vae(config: SvdConfig, device: str | torch.device = "cpu") -> Any:
    """The VAE, frozen, float32."""
    codec_of(config)
    return load_part(config.vae, "vae", device)


def new_image_encoder(config: SvdConfig) -> Any:
    """The CLIP tower of a new model: of its folder, or random, the same for the same seed, of values that half precision holds.

    Raises ValueError for a folder without one, or settings it lacks.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    if isinstance(config.image_encoder, Path):
        if not (config.image_encoder / "config.json").is_file():
            words = f"train one with: python -m reelflow.training.svd.tower {config.image_encoder}"
            raise ValueError(f"image_encoder: no CLIP tower in {config.image_encoder}; {words}")
        return load_part(config.image_encoder, TOWER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            tower: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**config.image_encoder))
        except (TypeError, ValueError) as error:
            raise ValueError(f"image_encoder: {str(error).splitlines()[0][:160]}") from None
    for p in tower.parameters():
        p.data = p.data.half().float()
    return tower.eval().requires_grad_(False)


def open_image_encoder(config: SvdConfig, device: str | torch.device = "cpu") -> Any:
    """The CLIP tower, frozen, float32: of `init`, or that which preparation left beside the latents, or where nothing is prepared new."""
    if not config.init and config.latents is None:
        return new_image_encoder(config).to(device)
    folder = resolve(config.init) if config.init else Path(config.latents or "")
    if not (folder / TOWER).is_dir():
        raise ValueError(f"{folder}: no {TOWER} beside the latents; prepare them with: reelflow train prepare CONFIG.yaml")
    return load_part(folder / TOWER, TOWER, device)


def open_unet(config: SvdConfig, states: int, device: torch.device) -> Any:
    """The UNet to train: of `init`, or new. states: channels of CLIP's embedding. Raises ValueError for settings that do not fit."""
    if config.init:
        return load_part(resolve(config.init) / "unet", "unet", device).requires_grad_(True).train()
    from diffusers import UNetSpatioTemporalConditionModel

    codec = codec_of(config)
    side, embedding = config.about.size // codec.factor, config.unet.get("addition_time_embed_dim", 256)
    own = {
        "sample_size": [side, side], "in_channels": 2 * codec.channels, "out_channels": codec.channels, "cross_attention_dim": states,
        "addition_time_embed_dim": embedding, "projection_class_embeddings_input_dim": 3 * embedding, "num_frames": config.about.frames,
    }  # fmt: skip
    for name in config.unet.keys() & (own.keys() - {"sample_size", "addition_time_embed_dim"}):
        if config.unet[name] != own[name]:
            raise ValueError(f"unet.{name} = {config.unet[name]}: follows from the other settings ({own[name]}); leave it out")
    torch.manual_seed(config.seed)
    try:
        unet: Any = UNetSpatioTemporalConditionModel(**(own | config.unet))
    except (TypeError, ValueError) as error:
        raise ValueError(f"unet: {str(error).splitlines()[0][:160]}") from None
    return unet.to(device).train()
