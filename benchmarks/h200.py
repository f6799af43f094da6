"""The 7 B shapes on one GPU: 81 frames of 480 × 848, seconds of every phase against what the hardware could do.

    python benchmarks/h200.py runs/h200               # everything, in less than half an hour; started again it goes on where it was
    python benchmarks/h200.py runs/h200 --only deep-bfloat16-128 --again
    python benchmarks/h200.py /tmp/tiny --tiny        # the same code at a size that a processor does in seconds
    python benchmarks/h200.py /tmp/narrow --narrow --only deep-bfloat16-128-finer shallow-bfloat16    # how it converges, on a processor

Needs torch, pydantic, safetensors; transformers for the prompt and diffusers for the VAE, without which those parts are skipped.
OUT gets results.json and table.md, written anew after every part, and latents.safetensors, which later parts start from.

No weights are needed: the network is `mini` grown to the published sizes (`grown.py`): widths 24 and 16 times its own, the
layers it lacks added as layers that write nothing. So it costs what the published one costs, and converges as a trained one does,
as far as mini's convergence on frames it was not trained on (30 × 53 places for 8 × 8) is that of the published weights: that
is an assumption, and passes are given beside seconds. Two things differ from the published configuration, neither of which
costs anything: positions span 8 (mini's), not 32, so that its places stand closer instead of further away than in training, and
text tokens are spread so that theirs are mini's.

Floor: matrix products at 790 TFLOP/s (twice that in fp8) or weights at 4.3 TB/s, whichever takes longer, plus attention, likewise;
`rates` has those of this card. Shares are of these 790 and 4.3, in fp8 too.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from phases import build, deep, denoiser, first_frame, one_pass, published, rates, shallow, vae, whole
from rig import FULL, Machine, Missing, Size, narrow, tiny

from reelflow.adapters.checkpoint import written


def parts(size: Size) -> dict[str, Callable[[Machine], dict[str, Any]]]:
    """Everything there is to measure, by name, in order."""
    found: dict[str, Callable[[Machine], dict[str, Any]]] = {"rates": rates}
    for precision in ("bfloat16", "fp8"):
        found[f"build-{precision}"] = partial(build, precision=precision)
        for window in size.windows:
            for graph in (True, False):
                name = f"pass-{precision}-{window}-{'graph' if graph else 'eager'}"
                found[name] = partial(one_pass, precision=precision, window=window, graph=graph)
        for window in size.windows:
            found[f"deep-{precision}-{window}"] = partial(deep, precision=precision, window=window)
        if precision == "bfloat16":
            found[f"deep-{precision}-{size.windows[0]}-eager"] = partial(deep, precision=precision, window=size.windows[0], graph=False)
            found[f"deep-{precision}-{size.windows[0]}-finer"] = partial(deep, precision=precision, window=size.windows[0], tolerance=1e-2)
        for name, run in (("shallow", shallow), ("denoiser", denoiser), ("first-frame", first_frame), ("whole", whole)):
            found[f"{name}-{precision}"] = partial(run, precision=precision)
    for dtype in ("bfloat16", "float32"):
        for whose in ("ours", "diffusers"):
            found[f"vae-{whose}-{dtype}"] = partial(vae, dtype=dtype, whose=whose)
    found["published-our-engine-bfloat16"] = partial(published, own_engine=False, frames=size.latents[0])
    found["published-float32"] = partial(published, own_engine=True, frames=2)
    return found


COLUMNS = ("seconds", "floor", "passes", "evaluations", "ms_per_pass", "floor_ms_per_pass", "share_of_flops", "share_of_bytes", "peak_gib")


def table(found: dict[str, dict[str, Any]]) -> str:
    """A line per part."""

    def word(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [("part", *COLUMNS, "else"), ["---"] * (len(COLUMNS) + 2)]
    for name, result in found.items():
        rest = ", ".join(f"{key} {word(value)}" for key, value in result.items() if key not in COLUMNS)
        lines.append((name, *(word(result.get(key, "")) for key in COLUMNS), rest))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder of results; those there are not measured again")
    parser.add_argument("--tiny", action="store_true", help="a size that a processor does in seconds, to try the code")
    parser.add_argument("--narrow", action="store_true", help="three published frames in mini's own width, to see how it converges there")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts, by the beginning of their names (default: all)")
    parser.add_argument("--again", action="store_true", help="also parts that are there already")
    parser.add_argument("--minutes", type=float, default=28, help="no part is begun after so many (default: 28)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: a GPU if there is one)")
    options = parser.parse_args()
    if options.device == "cpu" and not (options.tiny or options.narrow):
        sys.exit("error: no GPU that PyTorch can use; --tiny runs the same code on a processor")
    began, size = time.perf_counter(), tiny() if options.tiny else narrow() if options.narrow else FULL
    options.output.mkdir(parents=True, exist_ok=True)
    at, path = Machine(size, options.output, torch.device(options.device)), options.output / "results.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("rates", {}).get("latents", list(size.latents)) != list(size.latents):
        sys.exit(f"error: {path} is of another size, {found['rates']['latents']}; give another folder")
    for name, run in parts(size).items():
        if (options.only and not name.startswith(tuple(options.only))) or (name in found and not options.again):
            continue
        if time.perf_counter() - began > 60 * options.minutes:
            print(f"{name}: not begun, {options.minutes:g} minutes are over")
            continue
        found[name] = measured(at, run)
        print(name, found[name], flush=True)
        with written(path) as partial_file:
            partial_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        with written(options.output / "table.md") as partial_file:
            partial_file.write_text(table(found), encoding="utf-8")


def measured(at: Machine, run: Callable[[Machine], dict[str, Any]]) -> dict[str, Any]:
    """The result with the most memory it took, or why there is none; an error ends its part only."""
    gc.collect()
    if at.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        result = run(at)
    except Missing as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # noqa: BLE001 - whatever it is, the other parts are still worth their time
        at.held.clear()
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    return result | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if at.device.type == "cuda" else {})


if __name__ == "__main__":
    main()
