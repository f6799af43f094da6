"""What the parts of `h200.py` run on: the sizes, and the device with what is built on it.

Shapes: B clips, F latent frames, C latent channels, h × w places.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from grown import flow_of, grow, spread
from safetensors.torch import load_file, save_file
from torch import Tensor

from reelflow.adapters.checkpoint import written
from reelflow.adapters.hub import resolve
from reelflow.config import DenoiserConfig, FlowConfig
from reelflow.flow import StarFlow

PUBLISHED = FlowConfig(
    channels=48, width=3072, deep_width=4096, layers=(2, 2, 2, 2, 2, 24), window=21, text_tokens=256, text_dim=2048, position_span=8,
    noise_std=0.5, denoiser=DenoiserConfig(layers=8, width=3072, window=10),
)  # fmt: skip
VAE = {
    "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True], "is_residual": True,
    "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_temporal": 4, "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """latents: (frames, height, width). vae: what differs from `VAE`. square: side of the matrices that rates are measured on."""

    config: FlowConfig
    latents: tuple[int, int, int]
    windows: tuple[int, ...]
    vae: dict[str, Any]
    square: int


FULL = Size(PUBLISHED, (21, 30, 53), (128, 184, 256), {"base_dim": 160, "decoder_base_dim": 256}, 8192)


def tiny() -> Size:
    small = flow_of(resolve("mini")).config
    return Size(small, (2, 3, 4), (4, 8), {"base_dim": 4, "decoder_base_dim": 4, "num_res_blocks": 1}, 128)


def narrow() -> Size:
    """Frames and text of the published size in mini's own width, three of them: how it converges there, without a GPU."""
    config = flow_of(resolve("mini")).config.model_copy(update={"window": PUBLISHED.window, "text_tokens": PUBLISHED.text_tokens})
    return Size(config, (3, *FULL.latents[1:]), FULL.windows, tiny().vae, 128)


@dataclass
class Machine:
    """The device, the sizes, and what is built on it when it is first asked for."""

    size: Size
    folder: Path
    device: torch.device
    held: dict[str, StarFlow] = field(default_factory=dict)

    def model(self, precision: str) -> StarFlow:
        """One at a time; `fp8` from bfloat16."""
        if precision not in self.held:
            if precision == "fp8" and find_spec("torchao") is None:
                raise Missing("no torchao")
            self.held.clear()
            gc.collect()
            dtype = torch.float32 if precision == "float32" else torch.bfloat16
            model = self.held[precision] = grow(flow_of(resolve("mini")), self.size.config, dtype, self.device)
            if precision == "fp8":
                from reelflow.adapters.precision import quantiser

                quantise = quantiser(model, precision, self.device)
                assert quantise is not None
                for name, module in [*model.named_modules()]:
                    quantise(name, module)
        return self.held[precision]

    @cached_property
    def noise(self) -> Tensor:
        frames, height, width = self.size.latents
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, frames, self.size.config.channels, height, width, generator=generator).to(self.device)

    @cached_property
    def texts(self) -> Tensor:
        """Mini's states of a prompt and of none, spread over the tokens of the large model; without transformers, noise like them."""
        folder, config = resolve("mini"), flow_of(resolve("mini")).config
        try:
            from reelflow.adapters.text import load_text_encoder, wrap_prompt

            encoder = load_text_encoder(folder / "text_encoder", folder / "tokenizer", config.text_tokens)
            prompts = [wrap_prompt(text, fps=16, image=False, noise_std=None, aspect=None) for text in ("a red ball moves right", "")]
            states = encoder.encode(prompts).states
        except ImportError:
            print("no transformers: the text is noise")
            states = 0.6 * torch.randn(2, config.text_tokens, config.text_dim, generator=torch.Generator().manual_seed(1))
        return spread(states, self.size.config.text_tokens, self.size.config.text_dim).to(self.device)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, run: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
        """Median seconds, and the last result."""
        spent = []
        for _ in range(repeats):
            began = self.now()
            result = run()
            spent.append(self.now() - began)
        return statistics.median(spent), result

    def kept(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Tensors kept for later parts, these among them from now on."""
        path = self.folder / "latents.safetensors"
        found = load_file(path) if path.exists() else {}
        if tensors:
            found |= {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
            with written(path) as partial:
                save_file(found, partial)
        return {name: tensor.to(self.device) for name, tensor in found.items()}


class Missing(Exception):  # noqa: N818
    """Something this part needs is not here; the line says what."""
