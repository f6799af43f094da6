"""Stable Video Diffusion against diffusers' pipeline: same random weights, picture, seed and steps, in one process, taking turns.

    python benchmarks/svd.py [--steps 5 10] [--frames 14] [--size 256x128] [--repeats 2] [--threads 2] [--precision bfloat16]
                             [--compile] [--model FOLDER] [--json FILE]

What `reelflow bench svd --against-diffusers` does, of a random model: 61.7 M parameters in its UNet, 24.5 M in its VAE and 4.0 M in
CLIP; its weights say nothing of quality. Seconds are wall clock; `CPU` is the processor time of all threads, which a busy machine
changes less.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from reelflow.adapters.svd import SCHEDULER, Parts, load_parts
from reelflow.config import ModelConfig
from reelflow.evaluation.svd import measure, table

WIDTHS, STATES = (64, 128, 256, 256), 256


def random_parts() -> Parts:
    """All classes of the released model at a mid size."""
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=16, block_out_channels=WIDTHS, num_attention_heads=tuple(width // 32 for width in WIDTHS), cross_attention_dim=STATES,
        addition_time_embed_dim=64, projection_class_embeddings_input_dim=192, num_frames=14,
    )  # fmt: skip
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=WIDTHS, layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4
    )
    config = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, patch_size=32, projection_dim=STATES
    )
    for name, parameter in [*unet.named_parameters(), *vae.named_parameters()]:
        if name.endswith("mix_factor"):
            parameter.data.normal_()
    about = ModelConfig.parse(
        {"family": "svd", "name": "random", "size": 128, "frames": 14, "fps": 7, "guidance": 3.0, "tasks": ["animate"]}
    )
    return Parts(about, unet.eval(), vae.eval(), CLIPVisionModelWithProjection(config).eval(), EulerDiscreteScheduler(**SCHEDULER))


def cast(parts: Parts, dtype: torch.dtype) -> Parts:
    """In place, as models are loaded: the VAE's encoder stays in float32."""
    for module in (parts.unet, parts.image_encoder, parts.vae.decoder):
        module.to(dtype)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model to measure instead of the random one")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10], help="Euler steps, one table each (default: 5 and 10)")
    parser.add_argument("--frames", type=int, default=14, help="(default: 14)")
    parser.add_argument("--size", default="256x128", help="WIDTHxHEIGHT (default: 256x128)")
    parser.add_argument("--repeats", type=int, default=1, help="timings of each, from 1; the quickest counts (default: 1)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of both (default: float32)")
    parser.add_argument("--compile", action="store_true", help="ours after SvdPipeline.compile: minutes before the first timing")
    parser.add_argument("--threads", type=int, help="of the processor (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    width, height = map(int, options.size.split("x"))
    dtype = getattr(torch, options.precision)
    parts = load_parts(options.model, dtype=dtype) if options.model else cast(random_parts(), dtype)
    asked = options.frames, (width, height)
    results = [measure(parts, *asked, steps, options.repeats, against=True, compiled=options.compile) for steps in options.steps]
    print("\n\n".join(map(table, results)))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
