"""How the released Stable Video Diffusion XT fits a device: what `--memory-budget` picks for 25 frames of 576 × 1024, and what it counts.

    python benchmarks/svd_budget.py      # weights without values, 10 GB of a CPU's memory, a few minutes; no GPU

Bytes of a stage are all that is on the device in it: the reserve for the GPU's context and its libraries (assumed, not measured),
weights, activations. What an allocator loses between tensors is not counted.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from reelflow.adapters.svd import SCHEDULER, Parts
from reelflow.config import ModelConfig
from reelflow.pipelines.account import RESERVE
from reelflow.pipelines.budget import words
from reelflow.pipelines.svd import SvdPipeline
from reelflow.pipelines.svd.budget import STAGES, Account, Asked, Way

CLIP = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14, "image_size": 224,
    "projection_dim": 1024, "hidden_act": "gelu",
}  # fmt: skip
CLIPS = {"25 frames": Asked(25, 576, 1024, True), "14 frames": Asked(14, 576, 1024, True)}
WAYS = {"all on the device": Way(), "in turns": Way(turns=True), "in turns, thrifty": Way(turns=True, thrifty=True)}


def released(dtype: torch.dtype) -> SvdPipeline:
    """The classes and sizes of the released model, its values whatever was in memory."""
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(sample_size=96, num_attention_heads=(5, 10, 20, 20), num_frames=25)
        vae = AutoencoderKLTemporalDecoder(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4
        )
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP))
    for part in (unet, vae.decoder, tower):
        nn.Module.to(part, dtype)  # past diffusers' own, which has something to say
    unet, vae, tower = (part.to_empty(device="cpu").eval() for part in (unet, vae, tower))
    about = ModelConfig.parse(
        {"family": "svd", "name": "svd-xt", "size": 768, "frames": 25, "fps": 7, "guidance": 3.0, "tasks": ["animate"]}
    )
    return SvdPipeline(Parts(about, unet, vae, tower, EulerDiscreteScheduler(**SCHEDULER)))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    account = Account(released(torch.bfloat16), "cuda")
    sizes = ", ".join(f"{part} {words(size)}" for part, size in account.weights.items())
    print(f"bfloat16; weights: {sizes}; reserve {words(RESERVE['cuda'])}\n")
    print("| clip | way |", *(f"{stage} |" for stage in STAGES), "needs |")
    print("| --- " * (len(STAGES) + 3) + "|")
    for clip, asked in CLIPS.items():
        for name, way in WAYS.items():
            stages = account.stages(way, asked)
            print(f"| {clip} | {name} |", *(f"{words(size)} |" for size in stages.values()), f"{words(max(stages.values()))} |", flush=True)


if __name__ == "__main__":
    main()
