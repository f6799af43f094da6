"""How fast Stable Video Diffusion samples: seconds, memory and arithmetic of each phase, and diffusers' pipeline beside it if asked.

    reelflow bench svd --model svd-xt --against-diffusers

    encoding   the picture through CLIP and the VAE's encoder
    sampling   Euler's steps through the UNet, twice a step under guidance
    decoding   all frames through the VAE's decoder

`gflop` is the arithmetic of matrix products and convolutions that a phase needs (attention to one key as a constant, enlargements
before their convolutions), counted by torch on modules without values; `peak_share` is it by the phase's seconds and what the
device could do (`training.flops.peak`). Both pipelines have the same weights, picture, seed and steps, and take turns; the first
round of one step warms up, the quickest of the others counts. `peak_memory`: most bytes held beyond the loaded model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from reelflow.adapters.hub import resolve
from reelflow.adapters.svd import Parts, load_parts
from reelflow.evaluation.bench import Memory, now
from reelflow.pipelines.svd import Diffusion, SvdPipeline
from reelflow.pipelines.svd.picture import VIEW, check_size, factor
from reelflow.training.flops import peak
from reelflow.training.svd.codec import TemporalPass
from reelflow.training.svd.unet import flops as unet_flops

PHASES = ("encoding", "sampling", "decoding")
Run = Callable[[int], tuple[np.ndarray, dict[str, float]]]
"""Frames of so many steps, and the seconds of each phase."""


class Theirs:
    """diffusers' pipeline, with the seconds of its parts."""

    def __init__(self, parts: Parts, device: torch.device):
        from diffusers import StableVideoDiffusionPipeline
        from transformers import CLIPImageProcessor

        normalise = CLIPImageProcessor(
            image_mean=list(parts.clip_mean), image_std=list(parts.clip_std), size={"shortest_edge": VIEW},
            crop_size={"height": VIEW, "width": VIEW},
        )  # fmt: skip
        self.pipe: Any = StableVideoDiffusionPipeline(
            vae=parts.vae, image_encoder=parts.image_encoder, unet=parts.unet, scheduler=parts.scheduler, feature_extractor=normalise
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.seconds, self.device = dict.fromkeys(PHASES, 0.0), device
        for owner, name, phase in ((parts.vae, "encode", PHASES[0]), (parts.unet, "forward", PHASES[1]), (parts.vae, "decode", PHASES[2])):
            setattr(owner, name, self._timed(getattr(owner, name), phase))

    def _timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            began = now(self.device)
            found = function(*args, **options)
            self.seconds[phase] += now(self.device) - began
            return found

        return timed

    def run(self, picture: np.ndarray, frames: int, steps: int) -> tuple[np.ndarray, dict[str, float]]:
        from PIL import Image

        self.seconds = dict.fromkeys(PHASES, 0.0)
        made = self.pipe(
            Image.fromarray(picture), height=picture.shape[0], width=picture.shape[1], num_frames=frames, num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0), output_type="np",
        ).frames[0]  # fmt: skip
        return np.round(made * 255).astype(np.uint8), dict(self.seconds)


def arithmetic(parts: Parts, frames: int, height: int, width: int) -> dict[str, float]:
    """FLOPs of a clip: the picture's encoding, one pass of the UNet, decoding."""
    unit = factor(parts.vae)

    def counted(function: Callable[[], Any]) -> float:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            function()
        return float(counter.get_total_flops())

    with torch.device("meta"):
        vae = type(parts.vae).from_config(parts.vae.config).to("meta")
        tower = type(parts.image_encoder)(parts.image_encoder.config).to("meta")
    h, w, channels = height // unit, width // unit, parts.unet.config.out_channels
    if hasattr(parts.vae.decoder, "time_conv_out"):
        decoding = counted(lambda: TemporalPass(vae).decode(torch.empty(1, channels, frames, h, w)))
    else:
        decoding = frames * counted(lambda: vae.decode(torch.empty(1, channels, h, w)))
    encoding = counted(lambda: vae.encode(torch.empty(1, 3, height, width))) + counted(lambda: tower(torch.empty(1, 3, VIEW, VIEW)))
    return {"encoding": encoding, "step": unet_flops(parts.unet, frames, h, w), "decoding": decoding}


def run(
    model: str = "svd", device: str | None = None, precision: str = "auto", frames: int | None = None, size: tuple[int, int] | None = None,
    steps: int = 25, repeats: int = 1, against: bool = False, compiled: bool = False,
    progress: Callable[[str, float], None] = lambda phase, share: None,
) -> dict[str, Any]:  # fmt: skip
    """Benchmark a model; see `measure`.

    Raises:
        ValueError: unknown model, or one of another family.
    """
    place = resolve(model, half=precision not in ("auto", "float32"))
    if place.is_dir() and not (place / "model_index.json").is_file():
        raise ValueError(f"{model} is no Stable Video Diffusion; its sampling is what this measures")
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision {precision!r}: this family comes in float32 and bfloat16")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    parts = load_parts(place, where, getattr(torch, "float32" if precision == "auto" else precision))
    return measure(parts, frames, size, steps, repeats, against, compiled, progress)


def measure(
    parts: Parts, frames: int | None = None, size: tuple[int, int] | None = None, steps: int = 25, repeats: int = 1, against: bool = False,
    compiled: bool = False, progress: Callable[[str, float], None] = lambda phase, share: None,
) -> dict[str, Any]:  # fmt: skip
    """Rows of our pipeline, and of diffusers'.

    Args:
        frames: of a clip, by default the trained length.
        size: (width, height), multiples of 64, by default the model's own.
        steps: of Euler's method, 1 ….
        repeats: timings of each, 1 …; the quickest counts.
        against: also time diffusers' pipeline, whose frames are then compared.
        compiled: ours after `SvdPipeline.compile`; minutes more before the first timing.

    Returns:
        JSON-able: settings, parameters, `flops`, `rows` by pipeline, with `against` also `faster` and `difference` (levels of 255).
    """
    ours, length = SvdPipeline(parts), frames or parts.about.frames
    height, width = check_size(size) if size else ours.own_size
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    if compiled:
        ours.compile()

    def own(steps: int) -> tuple[np.ndarray, dict[str, float]]:
        sampling = Diffusion(steps=steps, fps=7, guidance=3.0, reference="diffusers" if against else "stability")  # as diffusers' defaults
        clip = ours.animate(picture, seed=0, frames=length, size=(width, height), sampling=sampling)
        return clip.frames, clip.metadata["seconds"]

    pipelines: dict[str, Run] = {}
    if against:
        theirs = Theirs(parts, ours.device)
        pipelines["diffusers"] = lambda steps: theirs.run(picture, length, steps)
    pipelines["reelflow"] = own
    rows, made = timed(pipelines, steps, repeats, ours.device, progress)
    need = arithmetic(parts, length, height, width)
    work = {"encoding": need["encoding"], "sampling": 2 * steps * need["step"], "decoding": need["decoding"]}
    best = peak(ours.device, str(ours.denoiser.dtype).removeprefix("torch."))
    for row in rows.values():
        row |= {f"{phase}_peak_share": work[phase] / max(row.get(phase, 0.0), 1e-9) / best for phase in PHASES}
        row["step"] = row["sampling"] / steps
    found: dict[str, Any] = {
        "model": parts.about.name, "device": str(ours.device), "precision": str(ours.denoiser.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "frames": length, "size": [width, height], "steps": steps,
        "compiled": compiled,
        "parameters": {part: sum(p.numel() for p in getattr(parts, part).parameters()) for part in ("unet", "vae", "image_encoder")},
        "flops": work | {"step": 2 * need["step"]}, "flop_share": {phase: work[phase] / sum(work.values()) for phase in PHASES},
        "rows": rows,
    }  # fmt: skip
    if against:
        found["faster"] = {name: rows["diffusers"][name] / rows["reelflow"][name] for name in (*PHASES, "total", "cpu")}
        found["difference"] = int(np.abs(made["diffusers"].astype(int) - made["reelflow"]).max())
    return found


def timed(
    pipelines: Mapping[str, Run], steps: int, repeats: int, device: torch.device, progress: Callable[[str, float], None]
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """The quickest row of each, and what it made; they take turns, after one round of a single step."""
    rows: dict[str, dict[str, Any]] = {}
    made: dict[str, np.ndarray] = {}
    for turn in range(repeats + 1):
        for index, (name, function) in enumerate(pipelines.items()):
            progress("benchmark", (turn * len(pipelines) + index) / ((repeats + 1) * len(pipelines)))
            memory, began, busy = Memory(device), now(device), time.process_time()
            made[name], seconds = function(steps if turn else 1)
            row: dict[str, Any] = seconds | {"total": now(device) - began, "cpu": time.process_time() - busy, "peak_memory": memory.most()}
            if turn and row["total"] < rows.get(name, {"total": np.inf})["total"]:
                rows[name] = row
    return rows, made


def table(found: Mapping[str, Any]) -> str:
    """The result of `run`, for reading."""
    parameters = ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in found["parameters"].items())
    work = ", ".join(f"{phase} {found['flops'][phase] / 1e9:,.1f} ({found['flop_share'][phase]:.0%})" for phase in PHASES)
    lines = [
        f"{found['model']} ({parameters}) on {found['device']}, {found['precision']}, {found['threads']} threads: "
        f"{found['frames']} frames of {found['size'][0]} × {found['size'][1]}, {found['steps']} steps with guidance"
        f"{', ours compiled' * found['compiled']}",
        f"GFLOP: {work}; a step {found['flops']['step'] / 1e9:,.1f}",
        f"{'seconds':>12}" + "".join(f"{name:>10}" for name in (*PHASES, "a step", "total", "CPU", "MiB")) + "   share of peak",
    ]
    for name, row in found["rows"].items():
        held = row["peak_memory"]
        values = "".join(f"{row[key]:10.3f}" for key in (*PHASES, "step", "total", "cpu"))
        shares = " ".join(f"{phase} {row[f'{phase}_peak_share']:.0%}" for phase in PHASES)
        lines.append(f"{name:>12}{values}{'' if held is None else f'{held / 2**20:10,.0f}'}   {shares}")
    if "faster" in found:
        phases, (total, cpu) = (found["faster"][key] for key in PHASES), (found["faster"][key] for key in ("total", "cpu"))
        lines.append(f"{'faster':>12}" + "".join(f"{times:9.2f}×" for times in phases) + f"{'':10}{total:9.2f}×{cpu:9.2f}×")
        lines.append(f"largest difference of a value: {found['difference']} of 255")
    return "\n".join(lines)
