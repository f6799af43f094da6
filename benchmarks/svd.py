"""Stable Video Diffusion against diffusers' pipeline: same random weights, picture, seed and steps, in one process, taking turns.

    python benchmarks/svd.py [--steps 10] [--frames 14] [--size 256x128] [--repeats 2] [--threads 2] [--model FOLDER] [--json FILE]

The random model has 61.7 M parameters in its UNet, 24.5 M in its VAE and 5.6 M in CLIP; its weights say nothing of quality. Seconds are
wall clock; `cpu` is the processor time of all threads, which a busy machine changes less.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from reelflow.adapters.svd import SCHEDULER, Parts, load_parts
from reelflow.config import ModelConfig
from reelflow.pipelines.svd import Diffusion, SvdPipeline

WIDTHS, STATES = (64, 128, 256, 256), 256
PHASES = ("encoding", "sampling", "decoding")


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


class Theirs:
    """diffusers' pipeline, with the seconds of its parts."""

    def __init__(self, parts: Parts):
        normalise = CLIPImageProcessor(
            image_mean=list(parts.clip_mean), image_std=list(parts.clip_std), size={"shortest_edge": 224},
            crop_size={"height": 224, "width": 224},
        )  # fmt: skip
        self.pipe = StableVideoDiffusionPipeline(
            vae=parts.vae, image_encoder=parts.image_encoder, unet=parts.unet, scheduler=parts.scheduler, feature_extractor=normalise
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.seconds: Counter[str] = Counter()
        timed = (parts.vae, "encode", "encoding"), (parts.unet, "forward", "sampling"), (parts.vae, "decode", "decoding")
        for owner, name, phase in timed:
            setattr(owner, name, self._timed(getattr(owner, name), phase))

    def _timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            found = function(*args, **options)
            self.seconds[phase] += time.perf_counter() - began
            return found

        return timed

    def run(self, picture: Image.Image, frames: int, steps: int) -> np.ndarray:
        self.seconds.clear()
        made = self.pipe(
            picture, height=picture.height, width=picture.width, num_frames=frames, num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0), output_type="np",
        ).frames[0]  # fmt: skip
        return np.round(made * 255).astype(np.uint8)


def measure(parts: Parts, picture: Image.Image, frames: int, steps: int, repeats: int) -> dict[str, Any]:
    ours, theirs = SvdPipeline(parts), Theirs(parts)
    rows: dict[str, dict[str, float]] = {}
    made: dict[str, np.ndarray] = {}

    def ours_run(steps: int) -> tuple[np.ndarray, dict[str, float]]:
        sampling = Diffusion(steps=steps, reference="diffusers")
        clip = ours.animate(picture, seed=0, frames=frames, size=picture.size, sampling=sampling)
        return clip.frames, clip.metadata["seconds"]

    def theirs_run(steps: int) -> tuple[np.ndarray, dict[str, float]]:
        return theirs.run(picture, frames, steps), dict(theirs.seconds)

    for repeat in range(repeats + 1):
        for name, run in (("diffusers", theirs_run), ("reelflow", ours_run)):
            began, busy = time.perf_counter(), time.process_time()
            made[name], seconds = run(steps if repeat else 1)  # the first round warms up
            row = seconds | {"total": time.perf_counter() - began, "cpu": time.process_time() - busy}
            if repeat and row["total"] < rows.get(name, {"total": np.inf})["total"]:
                rows[name] = row
    levels = int(np.abs(made["diffusers"].astype(int) - made["reelflow"]).max())
    faster = {name: rows["diffusers"][name] / rows["reelflow"][name] for name in rows["reelflow"]}
    return {"frames": frames, "size": picture.size, "steps": steps, "threads": torch.get_num_threads(), "seconds": rows, "faster": faster,
            "difference": levels}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model to measure instead of the random one")
    parser.add_argument("--steps", type=int, nargs="+", default=[10], help="Euler steps, one row each (default: 10)")
    parser.add_argument("--frames", type=int, default=14, help="(default: 14)")
    parser.add_argument("--size", default="256x128", help="WIDTHxHEIGHT (default: 256x128)")
    parser.add_argument("--repeats", type=int, default=1, help="timings of each, from 1; the quickest counts (default: 1)")
    parser.add_argument("--threads", type=int, help="of the processor (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    width, height = map(int, options.size.split("x"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    parts = load_parts(options.model) if options.model else random_parts()
    results = [measure(parts, picture, options.frames, steps, options.repeats) for steps in options.steps]
    print(f"{options.frames} frames of {options.size}, {torch.get_num_threads()} threads; seconds, then how many times faster")
    print("steps            " + "".join(f"{name:>10}" for name in (*PHASES, "total", "cpu")) + "   difference")
    for result in results:
        for name in ("diffusers", "reelflow"):
            values = (result["seconds"][name].get(phase, 0.0) for phase in (*PHASES, "total", "cpu"))
            print(f"{result['steps']:5} {name:11}" + "".join(f"{value:10.2f}" for value in values))
        values = (result["faster"][phase] for phase in (*PHASES, "total", "cpu"))
        print(f"{'':17}" + "".join(f"{value:9.2f}×" for value in values) + f"   {result['difference']} of 255")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
