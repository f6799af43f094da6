"""A model folder of the real classes at the smallest size that does everything: 64 × 64 pixels, 9 frames, all tasks.

Untrained; the output projections, which start at zero, are random, so that the map is not the identity.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from reelflow.adapters.checkpoint import save_weights
from reelflow.config import DenoiserConfig, FlowConfig, ModelConfig, PromptConfig
from reelflow.flow import StarFlow
from reelflow.training.config import TextConfig
from reelflow.training.text import new_text_encoder

CHANNELS, SIZE, FRAMES, FPS, TOKENS = 8, 64, 9, 8, 48
CAPTIONS = ["a red ball moves right on a black background", "make the box blue", "A video with 8 fps:"]


def tiny_vae() -> AutoencoderKLWan:
    """Factors 16 and 4 of Wan 2.2, 8 channels; standardised so that latents of pictures have about unit size."""
    return AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 2, 2], num_res_blocks=1, attn_scales=[],
        temperal_downsample=[False, True, True], is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_temporal=4, scale_factor_spatial=16, latents_mean=[0.0] * CHANNELS, latents_std=[0.3] * CHANNELS,
    )  # fmt: skip


def tiny_flow() -> StarFlow:
    config = FlowConfig(
        channels=CHANNELS, width=32, deep_width=64, layers=(1, 1, 2), head_dim=16, window=3, text_tokens=TOKENS, text_dim=16,
        position_span=4, denoiser=DenoiserConfig(layers=1, width=32, window=2),
    )  # fmt: skip
    flow = StarFlow(config)
    for name, module in flow.named_modules():
        if isinstance(module, nn.Linear) and name.endswith("proj_out"):
            nn.init.normal_(module.weight, std=0.1)
    return flow


def write_tiny(folder: Path, **about: object) -> Path:
    """Write the model; `about` changes its config.json."""
    torch.manual_seed(0)
    flow = tiny_flow()
    save_weights(flow.state_dict(), folder / "transformer")
    flow.config.write(folder / "transformer" / "config.json")
    tiny_vae().save_pretrained(str(folder / "vae"))
    text = new_text_encoder(TextConfig(width=16, layers=1, heads=2, vocabulary=300), TOKENS, CAPTIONS)
    text.model.save_pretrained(str(folder / "text_encoder"))
    text.tokenizer.save_pretrained(str(folder / "tokenizer"))
    values = {"family": "starflow-v", "name": "tiny", "size": SIZE, "frames": FRAMES, "fps": FPS, "latent_scale": 0.6, "guidance": 1.5}
    values |= {"tasks": ["generate", "animate", "edit", "extend"], "prompt": PromptConfig(fps=True), "later_windows": "extend", **about}
    ModelConfig.model_validate(values).write(folder / "config.json")
    (folder / "README.md").write_text("# tiny\n\nUntrained, for tests.\n", encoding="utf-8")
    return folder
