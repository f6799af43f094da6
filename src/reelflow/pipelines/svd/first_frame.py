"""The first frame of a text-to-video made by Stable Video Diffusion: painted by another model, handed over in floating point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from reelflow.adapters.hub import packaged
from reelflow.media.aspect import nearest_aspect
from reelflow.pipelines.base import Pipeline, Progress
from reelflow.pipelines.starflow import Sampling, StarFlowPipeline


def paint(name: str, prompt: str, seed: int, height: int, width: int, device: torch.device, progress: Progress) -> np.ndarray:
    """A picture of a prompt, float32 0 … 1 (H, W, 3), in the painter's size nearest to the one asked for.

    Args:
        name: a STARFlow (packaged name, folder, checkpoint file), or a diffusers text-to-image pipeline (folder or Hugging Face id).
            It is loaded, asked once, and let go.

    Raises:
        ValueError: it is neither, or cannot be loaded.
    """
    report: Progress = lambda phase, share: progress("painting", share)  # noqa: E731
    report("painting", 0.0)
    place = Path(name).expanduser()
    if (place / "model_index.json").is_file() or not (name in packaged() or place.exists()):
        return _by_diffusers(name, prompt, seed, height, width, device, report)
    from reelflow.pipelines import load

    return _by_starflow(load(name, device), prompt, seed, height, width, report)


def _by_starflow(pipe: Pipeline, prompt: str, seed: int, height: int, width: int, progress: Progress) -> np.ndarray:
    if not isinstance(pipe, StarFlowPipeline):
        raise ValueError(f"{pipe.about.name} ({pipe.about.family}) paints no first frame; give a STARFlow or a text-to-image model")
    pipe.require("generate")
    aspect = nearest_aspect(height, width) if pipe.about.prompt.aspect else "1:1"
    shape = pipe.codec.latent_shape(1, *pipe.framing.frame_size(aspect))
    latents, _ = pipe._sample([prompt], pipe._noise(seed, shape)[None], None, Sampling(), progress, aspect=aspect)
    pixels = next(pipe.codec.decode_pixels(latents.unbind(1)))
    return (pixels[0, :, 0] / 2).permute(1, 2, 0).cpu().numpy()


def _by_diffusers(name: str, prompt: str, seed: int, height: int, width: int, device: torch.device, progress: Progress) -> np.ndarray:
    from diffusers import AutoPipelineForText2Image

    try:
        painter: Any = AutoPipelineForText2Image.from_pretrained(
            name, use_safetensors=True, torch_dtype=torch.float32 if device.type == "cpu" else torch.bfloat16
        )
    except Exception as error:  # the libraries' errors share no base class: HTTP, offline, configuration, weights
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise ValueError(f"{name}: no text-to-image model can be loaded ({type(error).__name__}: {reason}); give another") from error
    painter.set_progress_bar_config(disable=True)
    generator, steps = torch.Generator().manual_seed(seed), {"count": 0}

    def step(pipe: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps["count"] += 1
        progress("painting", min(1.0, steps["count"] / max(1, pipe.num_timesteps)))
        return values

    made = painter.to(device)(
        prompt, height=height, width=width, generator=generator, output_type="np", callback_on_step_end=step
    ).images[0]  # fmt: skip
    return np.asarray(made, np.float32)


__all__ = ["paint"]
