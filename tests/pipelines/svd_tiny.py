"""Stable Video Diffusion at the smallest size its classes allow, random: 64 × 64 pixels, 4 frames; and diffusers' own pipeline on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from reelflow.adapters.svd import CLIP_MEAN, CLIP_STD, SCHEDULER, Parts
from reelflow.config import ModelConfig

FRAMES, STATES = 4, 32
BLOCKS = ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")


def spread(module: Any, seed: int) -> Any:
    """Norms and blends away from their neutral values, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("mix_factor"):
                parameter.normal_(generator=generator)
            elif "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def tiny_unet(**changes: Any) -> UNetSpatioTemporalConditionModel:
    torch.manual_seed(1)
    config: dict[str, Any] = {
        "sample_size": (8, 8),
        "down_block_types": BLOCKS[0],
        "up_block_types": BLOCKS[1],
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "num_attention_heads": (2, 2),
        "cross_attention_dim": STATES,
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 96,
        "num_frames": FRAMES,
    }
    return spread(UNetSpatioTemporalConditionModel(**{**config, **changes}), 2)


def tiny_vae() -> AutoencoderKLTemporalDecoder:
    torch.manual_seed(3)
    return spread(
        AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32, 32, 64), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4
        ),
        4,
    )


def tiny_image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(5)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, patch_size=32, projection_dim=STATES
        )
    ).eval()


def tiny_parts() -> Parts:
    about = ModelConfig.parse(
        {
            "family": "svd",
            "name": "tiny-svd",
            "size": 64,
            "frames": FRAMES,
            "fps": 7,
            "guidance": 3.0,
            "tasks": ["generate", "animate", "extend"],
        }
    )
    return Parts(about, tiny_unet(), tiny_vae(), tiny_image_encoder(), EulerDiscreteScheduler(**SCHEDULER))


def theirs(parts: Parts) -> StableVideoDiffusionPipeline:
    """diffusers' pipeline of the same modules."""
    normalise = CLIPImageProcessor(
        image_mean=CLIP_MEAN, image_std=CLIP_STD, size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
    )
    pipe = StableVideoDiffusionPipeline(
        vae=parts.vae, image_encoder=parts.image_encoder, unet=parts.unet, scheduler=parts.scheduler, feature_extractor=normalise
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_tiny(folder: Path, variant: str | None = None) -> Path:
    """As a folder of diffusers."""
    theirs(tiny_parts()).save_pretrained(str(folder), variant=variant)
    return folder


def write_text_to_image(folder: Path) -> Path:
    """A Stable Diffusion of a few thousand weights."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(6)
    folder.mkdir(parents=True)
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77),
        unet=UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=32,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=EulerDiscreteScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(str(folder))
    return folder
