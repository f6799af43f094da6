"""How much memory sampling takes, in a process of its own, which has loaded the model and done nothing else:

    python benchmarks/memory.py --model mini --sampler jacobi --latent-frames 9

One line of JSON: `sampling`, the most bytes held beyond the loaded model, and `whole`, all that the process ever held while sampling
(on a GPU what was allocated there, on a CPU what was resident; None where the system does not say).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from reelflow.evaluation.bench import PROMPTS, Case, Memory, flow_pipeline, resident
from reelflow.evaluation.published import Published
from reelflow.pipelines.prompting import Parts
from reelflow.pipelines.starflow import StarFlowPipeline
from reelflow.sampling import Schedule, sample

SAMPLERS = ("jacobi", "sequential", "published", "published, our engine")


def measure(**options: Any) -> dict[str, int | None]:
    """In a fresh process, with these options of the command line."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run([sys.executable, __file__, *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"memory of {options}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def inputs(pipe: StarFlowPipeline, frames: int, size: tuple[int, int] | None = None) -> tuple[Tensor, Parts, float]:
    """Noise of a clip of any length in latent frames, the texts of its windows, and guidance. `size`: latent (h, w), the model's own."""
    latent = size or pipe.codec.latent_shape(1, *pipe.framing.frame_size("1:1"))[1:]
    noise = torch.randn(1, frames, pipe.flow.config.channels, *latent, generator=torch.Generator().manual_seed(0)).to(pipe.device)
    guidance = pipe.prompting.guidance(None)
    return noise, pipe.prompting.parts([(0, [PROMPTS[0]])], guidance, "1:1", frames)[1], guidance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="name, model folder or Hugging Face id (default: mini)")
    parser.add_argument("--device", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the layers (default: float32)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="jacobi")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of jacobi and published (default: 0.001)")
    parser.add_argument("--window", type=int, help="of jacobi, tokens (default: the device's)")
    parser.add_argument("--latent-frames", type=int, help="of the clip (default: the trained length)")
    parser.add_argument("--mode", choices=("windows", "ring"), default="windows", help="beyond the trained length (default: windows)")
    options = parser.parse_args()
    pipe = flow_pipeline(options.model, options.device, options.precision)
    noise, texts, guidance = inputs(pipe, options.latent_frames or pipe.flow.config.window)
    memory = Memory(pipe.device)
    if options.sampler.startswith("published"):
        schedule = Published(options.tolerance, own_engine=options.sampler == "published")
        Case(schedule, options.precision).sample(pipe.flow, noise, texts[0][1], guidance)
    else:
        schedule = Schedule(options.sampler, options.tolerance, options.window)
        sample(pipe.flow, noise, texts, guidance, schedule=schedule, ring=options.mode == "ring")
    whole = torch.cuda.max_memory_allocated(pipe.device) if pipe.device.type == "cuda" else resident("VmHWM")
    print(json.dumps({"sampling": memory.most(), "whole": whole}))


if __name__ == "__main__":
    main()
