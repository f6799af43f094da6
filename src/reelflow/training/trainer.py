"""The training loop: exact NLL and flow-score matching from one backward pass.

On one device, or data-parallel under torchrun (every rank takes its rows of the batch; gradients are averaged). On a busy
CPU, as many ranks of one thread as there are cores are faster than one process with as many threads.

A step is a function of (weights, optimiser state, step number): batches and noise come from generators seeded by
(seed, step), so a run that is stopped and resumed is bit-identical to one that never stopped.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from reelflow.adapters.text import TextEncoder
from reelflow.flow import StarFlow
from reelflow.likelihood import HALF_LOG_TAU, add_noise
from reelflow.training.batches import Batch
from reelflow.training.config import TrainConfig
from reelflow.training.loss import nll, score_loss, score_target
from reelflow.training.muon import Muon


class Source(Protocol):
    def __call__(self, step: int) -> Batch:
        """The batch of a step: a function of the step alone."""


class Parts(nn.Module):
    """What is averaged and saved together: the flow and, where it is trained, its text encoder."""

    flow: StarFlow
    text: nn.Module | None

    def __init__(self, flow: StarFlow, text: nn.Module | None):
        super().__init__()
        self.flow, self.text = flow, text


class Trainer:
    """Owns weights, optimisers, averages and the checkpoint folder of one run.

    Args:
        source: gives the batch of a step.
        text: the text encoder; its weights are trained if `config.text` describes one.
        folder: checkpoint and log go there; an existing checkpoint is resumed.
    """

    def __init__(self, config: TrainConfig, source: Source, text: TextEncoder, folder: Path):
        torch.manual_seed(config.seed)
        self.config, self.source, self.text, self.folder = config, source, text, folder
        self.device = torch.device(config.device)
        self.flow = StarFlow(config.flow).to(self.device).train()
        self.train_text = not isinstance(config.text, Path)
        text.model.to(self.device).requires_grad_(self.train_text)
        self.parts = Parts(self.flow, text.model if self.train_text else None)
        self.average = AveragedModel(self.parts, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        denoiser = list(self.flow.denoiser.parameters()) if self.flow.denoiser else []
        own = {id(parameter) for parameter in denoiser}
        self.flow_parameters = [p for p in self.parts.parameters() if id(p) not in own]
        self.denoiser_parameters = denoiser

        def adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)

        layers = [p for block in self.flow.blocks for p in block.layers.parameters() if p.ndim == 2 and config.optimizer == "muon"]
        matrices = {id(p) for p in layers}
        self.optimizers = [adamw([p for p in self.flow_parameters if id(p) not in matrices], config.lr)]
        if layers:
            self.optimizers.append(Muon(layers, config.lr))
        self.peaks = [config.lr] * len(self.optimizers)
        if denoiser:
            self.optimizers.append(adamw(denoiser, config.denoiser_lr))
            self.peaks.append(config.denoiser_lr)
        self.step = 0
        self.skipped = 0
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self.restore()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def rate(self, step: int, peak: float) -> float:
        """Learning rate: linear warm-up, then cosine to `min_lr`."""
        config = self.config
        if step < config.warmup:
            return peak * (step + 1) / config.warmup
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def precision(self) -> torch.autocast | nullcontext[None]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.precision == "bfloat16" else nullcontext()

    def train_step(self) -> dict[str, float]:
        """One update of flow, text encoder and denoiser. Returns loss (nats per value), bits_per_dim, score_loss, grad_norm.

        Raises:
            ValueError: the loss is not finite; the weights are as they were before the step.
        """
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        batch = self.source(self.step)
        mine = slice(self.rank, None, self.ranks)
        x = add_noise(batch.latents, config.flow.noise_std, generator)[mine].to(self.device).requires_grad_()
        with self.precision():
            states = self.text.states(batch.prompts[mine])
            loss = nll(self.flow, x, states)
        loss.backward()
        assert x.grad is not None
        score = torch.zeros(())
        if self.flow.denoiser and config.stage(self.step).denoiser:
            with self.precision():
                score = score_loss(self.flow, x, score_target(self.flow, x.grad), states)
            score.backward()
        self.average_gradients()
        norm = float(nn.utils.clip_grad_norm_(self.flow_parameters, config.grad_clip))
        if not (math.isfinite(loss.item()) and math.isfinite(norm) and math.isfinite(score.item())):
            raise ValueError(f"step {self.step}: loss {loss.item()}, gradient norm {norm}: not finite; lower lr or use precision=float32")
        nn.utils.clip_grad_norm_(self.denoiser_parameters, config.grad_clip)
        skip = config.grad_skip and self.step >= 100 and norm > config.grad_clip
        self.skipped += skip
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = self.rate(self.step, peak)
            if not skip:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update_parameters(self.parts)
        self.step += 1
        return {
            "loss": loss.item(),
            "bits_per_dim": (loss.item() + HALF_LOG_TAU) / math.log(2),
            "score_loss": score.item(),
            "grad_norm": norm,
            "tokens": batch.latents.shape[0] * batch.latents.shape[1] * batch.latents.shape[3] * batch.latents.shape[4],
        }

    def average_gradients(self) -> None:
        """The mean over ranks, in place."""
        if self.ranks == 1:
            return
        gradients = [p.grad for p in (*self.flow_parameters, *self.denoiser_parameters) if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, (flat / self.ranks).split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def run(self, on_log: Callable[[dict], None] = lambda row: None, on_sample: Callable[[Trainer], None] = lambda trainer: None) -> None:
        """Train to the last step, logging a JSON line per `log_every` steps, saving and sampling as the configuration says."""
        config, rows, began, tokens = self.config, [], time.monotonic(), 0.0
        first = self.step
        while self.step < config.steps:
            rows.append(self.train_step())
            tokens += rows[-1]["tokens"]
            if self.step % config.log_every == 0 or self.step == config.steps:
                elapsed = time.monotonic() - began
                row = {key: round(sum(r[key] for r in rows) / len(rows), 5) for key in ("loss", "bits_per_dim", "score_loss", "grad_norm")}
                row |= {"step": self.step, "skipped": self.skipped, "tokens_per_second": round(tokens / elapsed)}
                row["seconds_left"] = round((config.steps - self.step) * elapsed / (self.step - first))
                rows = []
                if self.rank == 0:
                    with (self.folder / "log.jsonl").open("a") as log:
                        log.write(json.dumps(row) + "\n")
                    on_log(row)
            if self.rank == 0 and (self.step % config.save_every == 0 or self.step == config.steps):
                self.save()
            if self.rank == 0 and config.sample_every and self.step % config.sample_every == 0:
                on_sample(self)

    def save(self) -> None:
        """Write the checkpoint; the one before stays good until this one is whole."""
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "parts": self.parts.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.checkpoint)
        finally:
            temporary.unlink(missing_ok=True)

    def restore(self) -> None:
        """Continue from the folder's checkpoint. Raises ValueError where it is of another architecture."""
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.checkpoint}: damaged ({type(error).__name__}); remove it to start anew") from None
        try:
            self.parts.load_state_dict(state["parts"])
            self.average.load_state_dict(state["average"])
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            raise ValueError(f"{self.checkpoint}: of another architecture ({first}); give another folder") from None
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.skipped = state["step"], state["skipped"]
