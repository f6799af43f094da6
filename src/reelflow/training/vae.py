"""Train the small video VAE (`AutoencoderKLWan`) on toybox clips, and export it as a diffusers folder.

    python -m reelflow.training.vae runs/vae --export FOLDER
    torchrun --nproc-per-node 2 -m reelflow.training.vae runs/vae --export FOLDER      # one thread each: best on a busy CPU

`training.svd.vae` trains that of Stable Video Diffusion by the same loop.

Every batch follows from (seed, step, rank) alone, so a run that was stopped continues exactly where it was.
Shape suffixes: B batch, C channels, F frames, T latent frames, H height, W width. Pixels lie in [-1, 1].
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from torch import Tensor

from reelflow.data.toybox import CLIP, Split, render, sample_scene
from reelflow.training.allocator import keep_freed_memory
from reelflow.training.muon import Muon
from reelflow.training.one_pass import channels_last, one_pass
from reelflow.training.vae_batches import VaeTraining, backdrop, batch, foreground, to_pixels


def new_vae() -> AutoencoderKLWan:
    """The untrained VAE of `mini`: 48 channels, 16x in space, 4x in time, 2.9 M parameters."""
    vae = AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=16,
        z_dim=48,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    )
    vae.quant_conv.bias.data[48:] = -6.0  # begin with little noise: with unit noise the decoder learns to ignore the latents
    return vae


class Pass(Protocol):
    """A VAE over whole clips, with gradients."""

    def encode(self, x: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W) to mean and log-variance (B, 2C, T, h, w)."""

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, T, h, w) to pixels."""


class Kind(NamedTuple):
    """A kind of VAE that this loop trains. one_pass: of a VAE, and whether norms are compiled where it has such that can be."""

    about: str
    new: Callable[[], Any]
    open: Callable[[str], Any]
    one_pass: Callable[[Any, bool], Pass]
    reconstruct: Callable[[Any, Tensor], Tensor]
    """Pixels through a VAE as diffusers runs it."""
    latents: Callable[[Any, Tensor], Tensor]
    """Their mode (B, C, T, h, w)."""
    note: Callable[[Any, Tensor, Tensor, float], None]
    """Put the mean and standard deviation of the latents, by channel, into the VAE's configuration."""
    settings: VaeTraining
    frames: int = CLIP
    """Of the clips whose latents are measured for that."""


def loss_of(config: VaeTraining, model: Pass, x: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch, and its parts: weighted error of pixels and of edges, Kullback-Leibler term, PSNR in dB."""
    with torch.autocast(x.device.type, torch.bfloat16):
        mean, log_variance = model.encode(x).float().chunk(2, 1)
        log_variance = log_variance.clamp(-30, 20)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        y = model.decode(mean + (log_variance.exp() + config.noise**2).sqrt() * noise).float()
    weight = 1 + config.foreground * mask
    error = y - x
    pixels = ((error.square() + config.knee**2).sqrt() - config.knee).mul(weight).mean() / weight.mean()
    edges = sum(error.diff(dim=axis).abs().mul(weight.narrow(axis, 1, x.shape[axis] - 1)).mean() for axis in (3, 4)) / weight.mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = pixels + config.edges * edges + config.kl * kl
    parts = {"pixels": pixels, "edges": edges, "kl": kl, "psnr": -10 * (error.detach().clamp(-2, 2).square().mean() / 4).log10()}
    return loss, {name: float(value.detach()) for name, value in parts.items()}


class Trainer:
    """Model, optimiser and averaged weights; `state` and `load` make a run continue exactly."""

    def __init__(self, config: VaeTraining, vae: Any = None, fused: bool = False, kind: Kind | None = None) -> None:
        kind = kind or WAN
        self.config, self.step = config, 0
        torch.manual_seed(config.seed)
        self.vae = vae or kind.new()
        self.model = kind.one_pass(self.vae, fused)
        self.average = {name: value.detach().clone() for name, value in self.vae.state_dict().items()}
        if config.decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.parameters = [p for p in self.vae.parameters() if p.requires_grad]
        ends = (self.vae.encoder.conv_in.weight, self.vae.decoder.conv_out.weight)
        inner = [p for p in self.parameters if p.dim() >= 4 and not any(p is q for q in ends) and p.shape[1:].numel() > 1]
        others = [p for p in self.parameters if not any(p is q for q in inner)]
        adam = torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
        self.optimisers = [adam, Muon(inner, lr=config.learning_rate)]

    def update(self) -> dict[str, float]:
        """One optimiser step; with torch.distributed the gradients are averaged over the processes. Raises if not finite."""
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        x, mask = batch(self.config, self.step, rank)
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.step) * 64 + rank)
        loss, parts = loss_of(self.config, self.model, x, mask, generator)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"step {self.step}: loss is {loss.item()}; continue from the checkpoint with a lower learning rate")
        loss.backward()
        for p in self.parameters:  # one-frame batches leave the convolutions over time without a gradient
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if ranks > 1:
            flat = torch.cat([p.grad.flatten() for p in self.parameters])
            dist.all_reduce(flat)
            for p, grad in zip(self.parameters, flat.div_(ranks).split([p.numel() for p in self.parameters]), strict=True):
                p.grad.copy_(grad.view(p.shape))
        parts["grad"] = float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        if not math.isfinite(parts["grad"]):
            raise FloatingPointError(f"step {self.step}: gradient is not finite; continue from the checkpoint with a lower learning rate")
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.config.rate(self.step)
            optimiser.step()
        self.vae.zero_grad()
        self.step += 1
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        values = self.vae.state_dict()
        torch._foreach_lerp_([self.average[name] for name in values], list(values.values()), 1 - decay)
        return {"loss": float(loss.detach()), **parts}

    def averaged(self) -> Any:
        """A copy of the model with the averaged weights."""
        vae = type(self.vae).from_config(self.vae.config)
        vae.load_state_dict(self.average)
        return vae.eval()

    def state(self) -> dict:
        return {
            "step": self.step,
            "vae": self.vae.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }

    def load(self, state: dict) -> None:
        self.step = state["step"]
        self.vae.load_state_dict(state["vae"])
        self.average = {name: value.clone() for name, value in state["average"].items()}
        for optimiser, values in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(values)


def save(trainer: Trainer, path: Path) -> None:
    """Write the checkpoint beside `path`, then rename: never a broken file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(trainer.state(), temporary)
    temporary.replace(path)


@torch.no_grad()
def measure(
    vae: Any, seed: int, count: int = 8, frames: int = CLIP, split: Split = "any", kind: Kind | None = None
) -> dict[str, float]:
    """PSNR in dB of `vae` itself on fresh clips: all pixels, the objects' pixels, first frames, and the worst clip."""
    clips = render([sample_scene(seed, index, split=split) for index in range(count)], frames)
    x = to_pixels(clips)
    y = torch.cat([(kind or WAN).reconstruct(vae, piece) for piece in x.split(4)])
    square, mask = (y - x).square().mean(1) / 4, foreground(clips, backdrop(clips))

    def decibel(error: Tensor) -> float:
        return -10 * math.log10(max(error.mean().item(), 1e-10))

    worst = min(decibel(clip) for clip in square)
    return {"psnr": decibel(square), "objects": decibel(square[mask]), "first": decibel(square[:, 0]), "worst": worst}


@torch.no_grad()
def export(
    vae: Any, folder: str | Path, seed: int = 1, count: int = 64, frames: int = CLIP, floor: float = 0.1, kind: Kind | None = None
) -> dict[str, list[float]]:
    """Write the diffusers folder, with the mean and standard deviation of the latents of `count` clips in its config.

    A channel's deviation is at least `floor` times the mean deviation: a channel that carries nothing stays near zero
    when standardised, instead of becoming noise of unit variance. Returns the measured `mean` and `std`, before that.
    """
    kind, vae = kind or WAN, vae.float().eval()
    scenes = (sample_scene(seed, index) for index in range(count))
    latents = torch.cat([kind.latents(vae, to_pixels(render([scene], frames))) for scene in scenes])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    kind.note(vae, mean, std, floor)
    write(vae, folder)
    return {"mean": mean.tolist(), "std": std.tolist()}


def write(vae: Any, folder: str | Path) -> None:
    """Write the diffusers folder as it is, with the statistics that its config already has."""
    for parameter in vae.parameters():
        parameter.data = parameter.data.contiguous()
    vae.register_to_config(_name_or_path="")  # not the folder it was loaded from
    vae.save_pretrained(folder)


def train(
    config: VaeTraining, folder: Path, start: Path | None = None, fused: bool = True, log_every: int = 25, save_every: int = 250,
    kind: Kind | None = None,
) -> Trainer:  # fmt: skip
    """Train to `config.steps`, from `folder/vae.pt` if it is there, else from the diffusers folder `start` or from nothing.

    The first process prints and saves.
    """
    kind, first = kind or WAN, not dist.is_initialized() or dist.get_rank() == 0
    trainer = Trainer(config, kind.open(str(start)) if start else None, fused, kind)
    path = folder / "vae.pt"
    if path.exists():
        trainer.load(torch.load(path, weights_only=True))
    begin, clock, recent = trainer.step, time.monotonic(), []
    while trainer.step < config.steps:
        recent.append(trainer.update())
        done = trainer.step == config.steps
        if first and (trainer.step % log_every == 0 or done):
            pace = (trainer.step - begin) / (time.monotonic() - clock)
            means = "  ".join(f"{name} {np.mean([parts[name] for parts in recent]):.4f}" for name in recent[0])
            left = (config.steps - trainer.step) / pace
            sys.stderr.write(f"step {trainer.step}/{config.steps}  {means}  {pace:.2f} steps/s  {left / 60:.1f} min left\n")
            recent.clear()
        if first and (trainer.step % save_every == 0 or done):
            save(trainer, path)
            found = measure(trainer.averaged(), seed=10**6, count=4, frames=9, kind=kind)
            sys.stderr.write(
                "  averaged weights, fresh clips:  " + "  ".join(f"{name} {value:.2f} dB" for name, value in found.items()) + "\n"
            )
    return trainer


def _note_wan(vae: Any, mean: Tensor, std: Tensor, floor: float) -> None:
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.clamp_min(floor * std.mean()).tolist())


def _pass_of_wan(vae: Any, fused: bool) -> Pass:
    channels_last(vae)
    return one_pass(vae, fused)


WAN = Kind(
    "the small video VAE", new_vae, AutoencoderKLWan.from_pretrained, _pass_of_wan,
    lambda vae, x: vae.decode(vae.encode(x).latent_dist.mode()).sample,
    lambda vae, x: vae.encode(x).latent_dist.mode(), _note_wan, VaeTraining(),
)  # fmt: skip


def arguments(kind: Kind) -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=f"Train {kind.about} on toybox clips.")
    parser.add_argument("folder", type=Path, help="where the checkpoint vae.pt goes; a run found there is continued")
    parser.add_argument("--export", type=Path, help="folder to write the trained model to, in the diffusers layout")
    parser.add_argument("--init", dest="start", type=Path, help="diffusers folder to begin from, instead of an untrained model")
    parser.add_argument("--decoder-only", action="store_true", help="leave the encoder, and so all latents, as they are")
    parser.add_argument("--no-fused", action="store_true", help="do without the compiled norms (no C++ compiler)")
    for name, field in VaeTraining.model_fields.items():
        if field.annotation in (int, float):
            number: Callable[[str], int | float] = int if field.annotation is int else float
            usual = getattr(kind.settings, name)
            parser.add_argument(f"--{name.replace('_', '-')}", type=number, default=usual, help="default: %(default)s")
    return parser


def main(kind: Kind = WAN) -> None:
    """Command line: train, and export where asked."""
    options = vars(arguments(kind).parse_args())
    folder, target, start, fused = options.pop("folder"), options.pop("export"), options.pop("start"), not options.pop("no_fused")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    trainer = train(VaeTraining.parse(kind.settings.model_dump() | options), folder, start, fused, kind=kind)
    if target and (not dist.is_initialized() or dist.get_rank() == 0):
        if trainer.config.decoder_only:
            write(trainer.averaged(), target)
        else:
            std = sorted(export(trainer.averaged(), target, frames=kind.frames, kind=kind)["std"])
            sys.stderr.write(f"{target}: latent std from {std[0]:.3f} to {std[-1]:.3f}, median {std[len(std) // 2]:.3f}\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    keep_freed_memory()
    main()
