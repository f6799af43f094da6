"""What the model side can give to the speed of sampling: variants of one flow, trained alike, measured alike.

    reelflow train prepare examples/mini.yaml                            # once
    python benchmarks/choices.py runs/choices [--variants base "noise 0.5" …] [--steps 250]

Every variant is the flow of `examples/mini.yaml` with a few keys changed, trained by the trainer on the same batches in the
same order, then measured with its averaged weights in float32, on one thread unless told otherwise: `choices_measures`.
Before them the shipped model is measured, and what needs no training. Results are added to FOLDER/results.json one by one;
what is there is not done again, and training that was stopped goes on from its checkpoint. The tables are FOLDER/table.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from choices_measures import HeldOut, Variant, fold, latency, measure, mini, narrow, noise_cost, pass_cost, seeing_less

from reelflow.flow import StarFlow
from reelflow.pipelines.starflow import StarFlowPipeline
from reelflow.training.batches import Batch, CachedLatents
from reelflow.training.config import TextConfig, TrainConfig
from reelflow.training.export import averaged
from reelflow.training.flow import FlowObjective
from reelflow.training.text import new_text_encoder
from reelflow.training.trainer import Trainer

LONG_TOO = ("base", "sees 4 frames back")
"""Variants that are measured beyond the trained length, too."""

VARIANTS = {
    "base": Variant(),
    "patch 2 × 2": Variant({"channels": 192}, patch=2),
    "sees 4 frames back": Variant(past=4),
    "noise 0.5": Variant({"noise_std": 0.5}),
    "1 key head": Variant({"num_kv_heads": 1}),
    "3 shallow blocks": Variant({"layers": [1, 1, 1, 6]}),
    "3 layers of 384": Variant({"layers": [1, 1, 1, 1, 1, 3], "deep_width": 384}),
    "base, seed 1": Variant(seed=1),
    "2 key heads": Variant({"num_kv_heads": 2}),
    "patch 2 × 2, twice as wide": Variant({"channels": 192, "width": 256, "deep_width": 512}, patch=2),
}
SHIPPED = "mini as it ships"
BUCKETS = [
    {"task": "generate", "frames": 1, "batch": 28, "share": 0.15},
    {"task": "generate", "frames": 2, "batch": 14, "share": 0.2},
    {"task": "generate", "frames": 3, "batch": 9, "share": 0.25},
    {"task": "generate", "frames": 9, "batch": 3, "share": 0.3},
    {"task": "extend", "frames": 8, "batch": 3, "share": 0.1},
]


# --- training


def configuration(path: Path, variant: Variant, latents: Path, steps: int) -> TrainConfig:
    changed = {"denoiser": None} | variant.flow
    overrides = [f"flow.{key}={json.dumps(value)}" for key, value in changed.items()]
    rest = {
        "stages": [{"steps": steps, "buckets": BUCKETS}], "seed": variant.seed, "latents": str(latents), "ema": 0.98, "warmup": 20,
        "save_every": 50, "log_every": 25, "sample_every": 0,
    }  # fmt: skip
    return TrainConfig.load(path, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in rest.items())])


def train(config: TrainConfig, source: CachedLatents, variant: Variant, folder: Path) -> tuple[StarFlowPipeline, float | None]:
    """The pipeline of the averaged weights, and CPU seconds per step (None where there was nothing left to do)."""
    torch.manual_seed(config.seed)
    assert isinstance(config.text, TextConfig)
    text = new_text_encoder(config.text, config.flow.text_tokens, source.captions())

    def batch(step: int) -> Batch:
        latents, prompts = source(step)
        return Batch(torch.stack([fold(row, variant.patch) for row in latents]), prompts)

    trainer = Trainer(config, batch, FlowObjective(config, text), folder)
    narrow(trainer.objective.flow, variant)
    began, first = time.process_time(), trainer.step
    trainer.run(lambda row: print(json.dumps(row), flush=True))
    done, pipe = trainer.step - first, averaged(trainer)
    assert pipe is not None
    narrow(pipe.flow, variant)
    return pipe, (time.process_time() - began) / done if done else None


# --- the table


def rows(head: str, lines: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    names = head.split(", ")
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *lines)) + "\n"


def table(results: dict[str, Any]) -> str:
    """Markdown."""

    def passes(s: dict[str, float]) -> str:
        return f"{s['deep_passes']:.0f} + {s['shallow_passes']:.0f}"

    variants = results.get("variants", {})
    main = rows(
        "variant, bits/dim, above the noise, PSNR dB, passes, evaluations, CPU s, s, cached/frame, M parameters, training CPU s/step",
        (
            (
                name, f"{row['bits']:.4f} ± {row['error']:.4f}", f"{row['above_noise']:.4f}", f"{row['psnr']['tweedie']:.2f}",
                passes(s := row["sampling"]), f"{s['deep_evaluations']:.2f} + {s['shallow_evaluations']:.2f}",
                f"{s['cpu_seconds']:.2f}", f"{s['seconds']:.2f}", f"{row['cached_values_per_frame']:,}",
                f"{row['parameters'] / 1e6:.1f}", f"{row['train']:.2f}" if row.get("train") else "",
            )
            for name, row in variants.items()
        ),
    )  # fmt: skip
    beyond = rows(
        "variant, beyond the trained length, bits/dim, passes, CPU s for 17 latent frames",
        (
            (name, way, f"{found['bits']:.4f}", passes(found["sampling"]), f"{found['sampling']['cpu_seconds']:.2f}")
            for name, row in variants.items()
            for way, found in row.get("long", {}).items()
        ),
    )
    back = rows(
        "the shipped model sees so many frames back, bits/dim within the trained length, beyond",
        ((past, f"{row['within']:.4f}", f"{row['beyond']:.4f}") for past, row in results.get("seeing less", {}).items()),
    )
    waits = rows(
        "denoiser layers, looking ahead, latent frames until the first, CPU s, s",
        (
            (
                str(row["layers"]), row["look_ahead_layers"], str(row["frames_waited_for"]), f"{row['cpu_seconds']:.2f}",
                f"{row['seconds']:.2f}",
            )
            for row in results.get("latency", {}).get("denoiser", [])
        ),
    )  # fmt: skip
    costs = rows(
        "variant, CPU ms per deep pass, per shallow pass",
        ((name, f"{row['deep']:.1f}", f"{row['shallow']:.1f}") for name, row in results.get("pass cost", {}).items()),
    )
    noise = rows(
        "data noise σ, PSNR dB of noisy latents decoded",
        ((level, f"{value:.2f}") for level, value in results.get("noise", {}).get("PSNR", {}).items()),
    )
    return "\n".join((main, beyond, back, waits, noise, costs))


def add(folder: Path, section: str, name: str, make: Callable[[], Any]) -> None:
    """Make a result that is not there yet, and write it and the table. What another process added meanwhile stays."""
    file = folder / "results.json"

    def read() -> dict[str, Any]:
        return json.loads(file.read_text()) if file.exists() else {}

    if name in read().get(section, {}):
        return
    print(f"--- {section}: {name}", flush=True)
    found = make()
    results = read()
    results.setdefault(section, {})[name] = found
    file.write_text(json.dumps(results, indent=1, default=str) + "\n")
    (folder / "table.md").write_text(table(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="results, table and checkpoints")
    parser.add_argument("--config", type=Path, default=Path("examples/mini.yaml"), help="training configuration (default: %(default)s)")
    parser.add_argument("--latents", type=Path, default=Path("runs/latents"), help="cached latents (default: %(default)s)")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--steps", type=int, default=250, help="of training, from 1 (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=16, help="held-out clips, from 12 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="from 1 (default: 1)")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    o.folder.mkdir(parents=True, exist_ok=True)
    base = configuration(o.config, Variant(), o.latents, o.steps)
    held = HeldOut.make(base, o.clips, o.folder / f"held_out_{o.clips}.pt")
    prompts = base.sample_prompts
    add(o.folder, "variants", "mini as it ships", lambda: measure(mini(), Variant(), held, prompts, True))
    for past in (8, 4, 2, 1):
        add(o.folder, "seeing less", str(past), lambda past=past: seeing_less(held, past))
    add(o.folder, "latency", "denoiser", latency)
    add(o.folder, "noise", "PSNR", lambda: noise_cost(held, base.flow.window, (0.0, 0.3, 0.4, 0.5, 0.7)))

    def cost(variant: Variant) -> dict[str, float]:
        return pass_cost(StarFlow(configuration(o.config, variant, o.latents, o.steps).flow), variant.patch)

    for name, variant in VARIANTS.items():
        if not variant.seed:
            add(o.folder, "pass cost", name, lambda variant=variant: cost(variant))

    def trained(name: str) -> dict[str, Any]:
        variant = VARIANTS[name]
        config = configuration(o.config, variant, o.latents, o.steps)
        source = CachedLatents(configuration(o.config, Variant(seed=variant.seed), o.latents, o.steps))
        pipe, pace = train(config, source, variant, o.folder / name.replace(" ", "-").replace(",", ""))
        return {"what": asdict(variant), "steps": o.steps, "train": pace, **measure(pipe, variant, held, prompts, name in LONG_TOO)}

    for name in o.variants:
        add(o.folder, "variants", name, lambda name=name: trained(name))
    print((o.folder / "table.md").read_text())


if __name__ == "__main__":
    main()
