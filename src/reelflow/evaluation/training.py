"""How fast training is: our loop against a plain PyTorch loop over the same model and batch, and its memory against length.

    reelflow bench train examples/mini.yaml

The batch is that of the configuration's longest bucket, of random latents that are in memory already; text of a model with a
trained encoder goes through it, else its states are random too (no T5 is loaded). Weights are random unless `init` is given.
Loops take turns, step by step, so that a busy minute harms all alike. Each row:

    seconds, cpu_seconds   of a step, medians: on the clock, and of this process's work on all cores
    times_plain            of plain PyTorch: median of the ratios within a turn, of the seconds and of the CPU seconds
    tokens_per_second      of the batch, over all ranks
    mfu                    arithmetic that the model needs (`training.flops`) / seconds / what the device could do
    peak_memory            most bytes held beyond those before the step: activations, gradients (see `bench.Memory`)

The plain loop adds noise, computes both losses and their gradients, clips, and lets AdamW step: what the method needs and no
more. Ours also keeps the average, checks all values, draws its noise by seed, and meters itself.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelflow.adapters.text import TextEncoder
from reelflow.denoise import SCORE_UNIT
from reelflow.evaluation.bench import Memory, now
from reelflow.flow import StarFlow
from reelflow.training import flops, parallel
from reelflow.training.batches import Batch
from reelflow.training.config import Bucket, Stage, TextConfig, TrainConfig
from reelflow.training.flow import FlowObjective
from reelflow.training.text import new_text_encoder
from reelflow.training.trainer import Trainer

PROMPT = "a red ball moves right on a black background"
WARM_UP = 2


class Given(TextEncoder):
    """Random states in place of a large text encoder's."""

    def __init__(self, tokens: int, width: int, device: torch.device):
        super().__init__(nn.Module(), None, tokens)
        self.one = torch.randn(tokens, width, device=device)

    def states(self, prompts: list[str]) -> Tensor:
        return self.one.expand(len(prompts), -1, -1)


class Plain:
    """Training as one writes it down."""

    def __init__(self, config: TrainConfig, text: TextEncoder, latents: Tensor, device: torch.device):
        self.config, self.latents, self.device = config, latents.to(device), device
        self.flow, self.text = StarFlow(config.flow).to(device).train(), text
        denoiser = list(self.flow.denoiser.parameters()) if self.flow.denoiser else []
        own = {id(p) for p in denoiser}
        self.parameters = [p for p in (*self.flow.parameters(), *text.model.parameters()) if p.requires_grad and id(p) not in own]
        self.optimizers = [torch.optim.AdamW(some, lr=1e-4, betas=(0.9, 0.95), fused=True) for some in (self.parameters, denoiser) if some]
        self.denoiser = denoiser

    def step(self) -> None:
        noise_std, prompts = self.config.flow.noise_std, [PROMPT] * len(self.latents)
        x = (self.latents + noise_std * torch.randn_like(self.latents)).requires_grad_(bool(self.denoiser))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            states = self.text.states(prompts) if self.config.flow.text_tokens else None
            z, log_det = self.flow(x, states)
            loss = (0.5 * z.square() - log_det).mean()
        loss.backward()
        if self.denoiser:
            assert x.grad is not None
            target = noise_std**2 / SCORE_UNIT * x.numel() * x.grad
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
                score = (self.flow.score(x.detach(), None if states is None else states.detach()) - target).square().mean()
            score.backward()
        for some, optimizer in zip((self.parameters, self.denoiser), self.optimizers, strict=False):
            nn.utils.clip_grad_norm_(some, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def longest(config: TrainConfig) -> Bucket:
    """The bucket with the most tokens of a clip; of an edit both clips count."""
    return max((bucket for stage in config.stages for bucket in stage.buckets), key=latent_frames)


def latent_frames(bucket: Bucket) -> int:
    return bucket.frames * (2 if bucket.task == "edit" else 1)


def latents_of(config: TrainConfig, rows: int, frames: int) -> Tensor:
    """Random latents of square clips at the model's area (B, F, C, h, w)."""
    side = config.about.size // (8 if config.about.family == "starflow" else 16)
    return torch.randn(rows, frames, config.flow.channels, side, side)


def run(
    config: TrainConfig, steps: int = 10, lengths: Sequence[int] | None = None,
    progress: Callable[[str, float], None] = lambda phase, share: None,
) -> dict[str, Any]:  # fmt: skip
    """Benchmark the training of a configuration.

    Args:
        steps: timed turns, 1 …, after two to warm up.
        lengths: latent frames of the clips whose memory is measured, one clip each; by default 1, a third, two thirds, and all
            of the longest bucket's.

    Returns:
        JSON-able: settings, parameters, FLOPs, `rows` (loops) and `memory` (lengths).
    """
    ranks = parallel.join(config)
    torch.manual_seed(config.seed)
    bucket = longest(config)
    frames = latent_frames(bucket)
    latents = latents_of(config, bucket.batch, frames)
    if isinstance(config.text, TextConfig):
        text: TextEncoder = new_text_encoder(config.text, config.flow.text_tokens, [PROMPT])
    else:
        text = Given(config.flow.text_tokens, config.flow.text_dim, ranks.device)
    only = config.model_copy(update={"stages": (Stage(steps=10**9, buckets=(bucket,)),), "warmup": 0, "lr": 1e-6, "denoiser_lr": 1e-6})
    peak = flops.peak(ranks.device, config.precision) * ranks.count
    denoiser = config.flow.denoiser is not None
    work = flops.training_step(config.flow, frames, latents[0, 0, 0].numel(), denoiser, config.lora is not None) * bucket.batch
    tokens = bucket.batch * frames * latents[0, 0, 0].numel()
    with tempfile.TemporaryDirectory() as folder:

        def loop(changed: TrainConfig, name: str) -> Trainer[FlowObjective]:
            made = Batch(latents, [PROMPT] * bucket.batch)
            objective = FlowObjective(changed, copy.deepcopy(text), ranks)
            return Trainer(changed, lambda step: made, objective, Path(folder) / name, ranks)

        ours = loop(only, "ours")
        loops: dict[str, Callable[[], object]] = {}
        if ranks.count == 1 and ranks.mesh is None and config.lora is None:
            loops["plain PyTorch, AdamW"] = Plain(config, _on(copy.deepcopy(text), ours), latents, ranks.device).step
            if config.optimizer != "adamw":
                loops["reelflow, adamw"] = loop(only.model_copy(update={"optimizer": "adamw"}), "adamw").train_step
        loops[f"reelflow, {config.optimizer}"] = ours.train_step
        with ours.feed.ahead():
            rows = compare(loops, steps, ranks.device, lambda share: progress("loops", share))
        for row in rows:
            row |= {"tokens_per_second": tokens / row["seconds"], "mfu": work / row["seconds"] / peak}
        memory = grown(ours, config, lengths or sorted({1, math.ceil(frames / 3), math.ceil(2 * frames / 3), frames}), progress)
        ours.checkpoints.close()
    return {
        "model": config.about.name, "device": str(ranks.device), "ranks": ranks.count, "precision": config.precision,
        "recompute": config.recompute, "compile": config.compile, "offload": config.offload, "accumulate": config.accumulate,
        "parameters": sum(p.numel() for p in ours.objective.flow.parameters()), "trained": sum(p.numel() for p in ours.weights.values()),
        "batch": bucket.batch, "latents": {"frames": frames, "height": latents.shape[3], "width": latents.shape[4]},
        "tokens": tokens, "flops": work, "peak": peak, "steps": steps, "threads": torch.get_num_threads(), "rows": rows, "memory": memory,
    }  # fmt: skip


def _on(text: TextEncoder, trainer: Trainer[FlowObjective]) -> TextEncoder:
    """The text encoder on the trainer's device, trained if the trainer's is."""
    trained = any(p.requires_grad for p in trainer.objective.text.model.parameters())
    text.model.to(trainer.device).requires_grad_(trained)
    return text


def compare(
    loops: dict[str, Callable[[], object]], steps: int, device: torch.device, progress: Callable[[float], None]
) -> list[dict[str, Any]]:
    """A row per loop; the first is what the others are compared with."""
    clock: dict[str, list[float]] = {name: [] for name in loops}
    work: dict[str, list[float]] = {name: [] for name in loops}
    memory: dict[str, int | None] = {}
    for turn in range(WARM_UP + steps):
        for name, step in loops.items():
            held = Memory(device) if turn < WARM_UP else None
            began, cpu = now(device), time.process_time()
            step()
            took, used = now(device) - began, time.process_time() - cpu
            if held is not None:
                memory[name] = held.most()
            else:
                clock[name].append(took)
                work[name].append(used)
        progress((turn + 1) / (WARM_UP + steps))
    first = next(iter(loops))

    def ratio(found: dict[str, list[float]], name: str) -> float:
        return statistics.median(a / b for a, b in zip(found[name], found[first], strict=True))

    return [
        {
            "loop": name, "seconds": statistics.median(clock[name]), "cpu_seconds": statistics.median(work[name]),
            "times_plain": {"seconds": ratio(clock, name), "cpu_seconds": ratio(work, name)} if len(loops) > 1 else None,
            "peak_memory": memory[name],
        }
        for name in loops
    ]  # fmt: skip


def grown(
    trainer: Trainer[FlowObjective], config: TrainConfig, lengths: Iterable[int], progress: Callable[[str, float], None]
) -> list[dict[str, Any]]:
    """Memory of a step against the latent frames of its clips, one clip per rank and part."""
    rows, every = [], sorted(lengths)
    batch = trainer.ranks.count * config.accumulate
    for index, frames in enumerate(every):
        latents = latents_of(config, batch, frames)
        made = Batch(latents, [PROMPT] * batch)
        trainer.feed.source = lambda step, made=made: made
        trainer.train_step()  # what this length allocates once
        held = Memory(trainer.device)
        trainer.train_step()
        most, tokens = held.most(), frames * latents[0, 0, 0].numel()
        rows.append({"frames": frames, "tokens": tokens, "peak_memory": most, "per_token": None if most is None else most / tokens})
        progress("memory", (index + 1) / len(every))
    return rows


def table(found: dict[str, Any]) -> str:
    """The result of `run`, for reading."""
    size = found["latents"]
    lines = [
        f"{found['model']}, {found['parameters']:,} parameters ({found['trained']:,} trained) on {found['ranks']} × {found['device']}, "
        f"{found['precision']}, batch {found['batch']} of {size['frames']} × {size['height']} × {size['width']} latents, "
        f"{found['flops'] / 1e9:,.1f} GFLOP a step, at most {found['peak'] / 1e9:,.0f} GFLOP/s",
        f"{'':>24}  seconds  CPU s  × plain  × CPU  tokens/s    MFU    MiB",
    ]
    for row in found["rows"]:
        times, held = row["times_plain"] or {}, row["peak_memory"]
        lines.append(
            f"{row['loop']:>24}  {row['seconds']:7.3f}  {row['cpu_seconds']:5.2f}  {times.get('seconds', math.nan):7.3f}  "
            f"{times.get('cpu_seconds', math.nan):5.3f}  {row['tokens_per_second']:8,.0f}  {row['mfu']:5.1%}  "
            f"{'' if held is None else f'{held / 2**20:5,.0f}'}"
        )
    lines.append("memory of one clip's step by its latent frames:")
    for row in found["memory"]:
        held = row["peak_memory"]
        words = "not known here" if held is None else f"{held / 2**20:,.1f} MiB, {row['per_token'] / 2**10:,.1f} KiB per token"
        lines.append(f"{row['frames']:>6} frames, {row['tokens']:>6} tokens: {words}")
    return "\n".join(lines)
