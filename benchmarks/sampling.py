"""Speed, exactness and memory of every sampling schedule.

    python benchmarks/sampling.py                                       # one table: mini, float32 and bfloat16
    python benchmarks/sampling.py --all --write docs/performance.md     # all that docs/performance.md shows, about half an hour

`--all`: mini and the same function in a network of 60 M parameters (`grown.py`), memory of every sampler in a process of its own
(`memory.py`), cost against length and size, the ring against exact windows (`scaling.py`), where a clip's time goes, and decoding
against diffusers' own (`decoding.py`). `--write` puts each part between its marks `<!-- begin NAME -->` and `<!-- end NAME -->` of
the document, as soon as it is measured, and the plot beside it; `--only NAME …` measures some parts again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import decoding
import grown
import memory
import scaling

from reelflow.adapters.checkpoint import written
from reelflow.evaluation import profile
from reelflow.evaluation.bench import COLUMNS, cells, flow_pipeline, head, run, table
from reelflow.sampling import Schedule

PAIRS = {
    "float32": ((3e-2, 64), (1e-2, 32), (1e-2, 64), (1e-3, 32), (1e-3, 64), (1e-4, 64)),
    "bfloat16": ((1e-1, 64), (3e-2, 32), (3e-2, 64), (1e-2, 64)),
}
"""Tolerance and window."""
PUBLISHED = (1e-3, 1e-4, 1e-5)
PARTS = ("mini", "large", "length", "ring", "profile", "decoding")
Rows = Sequence[Sequence[str]]


def markdown(columns: Sequence[str], rows: Rows) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *rows))


def samplers(model: str, repeats: int, say: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """Every sampler in both precisions, each row's memory in a process of its own."""
    schedules: Any = {precision: [Schedule("jacobi", *pair) for pair in pairs] for precision, pairs in PAIRS.items()}
    found = run(model, schedules=schedules, published=PUBLISHED, repeats=repeats)
    held: dict[tuple[str, str], int | None] = {}
    for row in found["rows"]:  # how exact it is makes no difference, and the window hardly any: the largest
        key = (row["sampler"], row["precision"])
        if key not in held:
            window = {"window": 64} if row["sampler"] == "jacobi" else {}
            held[key] = memory.measure(model=model, sampler=row["sampler"], precision=row["precision"], **window)["sampling"]
        row["peak_memory"] = held[key]
    say(table(found))
    rows = [tuple(cells(row)) for row in found["rows"]]
    busy = "" if found["load_before"] is None else f"; load before the run {found['load_before']:.1f}"
    note = f"{head(found)}; torch {found['machine']['torch']}, median of {repeats}, schedules in turns{busy}."
    return "\n\n".join((note, markdown(COLUMNS, rows), reading(found["rows"]))), found


def reading(rows: Sequence[dict[str, Any]]) -> str:
    """What the rows say, in their own numbers."""

    def pick(sampler: str, precision: str, tolerance: float | None = None, window: int | None = None) -> dict[str, Any]:
        wanted = {"sampler": sampler, "precision": precision, "tolerance": tolerance, "window": window}
        return next(row for row in rows if all(row[key] == value for key, value in wanted.items() if value is not None))

    def against(precision: str, other: dict[str, Any], own: dict[str, Any], name: str) -> str:
        time, work = other["seconds"] / own["seconds"], other["cpu_seconds"] / own["cpu_seconds"]
        return (
            f"- {precision}, {name}: {time:.2f} times as fast ({work:.2f} in processor time), "
            f"{other['passes']['deep'] / own['passes']['deep']:.2f} times fewer passes of the deep block, rms error {own['rms_error']:.1e} "
            f"instead of {other['rms_error']:.1e}."
        )

    lines = []
    for precision in ("float32", "bfloat16"):
        own = pick("jacobi", precision, 1e-2, 64)
        others = [pick("published, our engine", precision, tolerance) for tolerance in PUBLISHED]
        rough, alike = others[0], min(others, key=lambda row: abs(math.log(row["rms_error"] / own["rms_error"])))
        lines += [
            against(precision, pick("sequential", precision), own, "tolerance 1e-2, window 64, against sequential in the same precision"),
            against(precision, pick("published", "float32"), own, "against the published sampler as it ran, in float32"),
            against(precision, rough, own, "against the published algorithm on our engine, at its own tolerance"),
            against(precision, alike, own, f"against it at {alike['tolerance']:g}, where its error is nearest to ours"),
        ]
    return "\n".join(lines)


def length(model: str, repeats: int, picture: Path | None, say: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    pipe = flow_pipeline(model)
    found = {"length": scaling.lengths(pipe, model, repeats), "resolution": scaling.resolutions(pipe, repeats)}
    if picture:
        scaling.plot(picture, found["length"], found["resolution"], pipe.about.fps, pipe.codec.temporal_factor)
    rows = [
        (str(row["latent_frames"]), row["mode"], f"{row['seconds']:.3g}", f"{row['cpu_seconds']:.3g}", str(row["passes"]))
        for row in found["length"]["rows"]
    ]
    short, long = found["length"]["short"], found["length"]["long"]
    ratios = [
        (mode, *("" if value is None else f"{value:.2f}" for value in parts.values())) for mode, parts in found["length"]["ratios"].items()
    ]
    sizes = [
        (
            f"{row['height']} × {row['width']}", f"{row['seconds']:.3g}", f"{row['cpu_seconds']:.3g}", str(row["passes"]),
            f"{row['evaluations']:.2f}",
        )
        for row in found["resolution"]
    ]  # fmt: skip
    words = (
        markdown(("latent frames", "beyond the window", "seconds", "CPU s", "passes, deep"), rows),
        f"{long} latent frames against {short} (30 s of video against 5 s, {long / short:.2f} times the tokens):",
        markdown(("beyond the window", "time", "CPU time", "memory of the process", "memory beyond the model"), ratios),
        "Larger frames, which mini was not trained on (their cost is what counts here):",
        markdown(("places", "seconds", "CPU s", "passes, deep", "evaluations per token"), sizes),
    )
    say("\n\n".join(words))
    return "\n\n".join(words), found


def ring(model: str, say: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    found = scaling.ring(flow_pipeline(model))
    words = "\n\n".join((
        markdown(("a sample of → read by", "rms distance, σ"), [(name, f"{value:.1e}") for name, value in found["distance"].items()]),
        markdown(
            ("sampled with", "bits per value, first window", "last window"),
            [(mode, f"{parts['first']:.3f}", f"{parts['last']:.3f}") for mode, parts in found["bits_per_dim"].items()],
        ),
    ))  # fmt: skip
    say(words)
    return words, found


def profiles(models: dict[str, Any], say: Callable[[str], None]) -> tuple[str, list[dict[str, Any]]]:
    found = [profile.run(model, precision=precision, repeats=1) for model, precision in models.items()]
    words = "\n\n".join(f"```\n{profile.table(one)}\n```" for one in found)
    say(words)
    return words, found


def decoded(repeats: int, say: Callable[[str], None]) -> tuple[str, list[dict[str, Any]]]:
    found = decoding.run(repeats)
    words = markdown(decoding.COLUMNS, [decoding.cells(row) for row in found])
    say(words)
    return words, found


def insert(document: Path, name: str, words: str) -> None:
    """Put words between the marks of a part. Raises ValueError where the document has none."""
    text = document.read_text(encoding="utf-8")
    found, count = re.subn(
        rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", lambda marks: f"{marks[1]}{words}\n{marks[2]}", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{document}: has no part {name!r}; it stands between <!-- begin {name} --> and <!-- end {name} -->")
    with written(document) as partial:
        partial.write_text(found, encoding="utf-8")


def everything(repeats: int, document: Path | None, only: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """All parts, or some; what was measured, by part."""
    if unknown := set(only) - set(PARTS):
        raise ValueError(f"--only {', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "mini × 3"
        grown.write(large)
        parts: dict[str, Callable[[], tuple[str, Any]]] = {
            "mini": lambda: samplers("mini", repeats, say),
            "large": lambda: samplers(str(large), max(1, repeats - 2), say),
            "length": lambda: length("mini", max(1, repeats - 2), document and document.with_suffix(".png"), say),
            "ring": lambda: ring("mini", say),
            "profile": lambda: profiles({"mini": "float32", str(large): "bfloat16"}, say),
            "decoding": lambda: decoded(repeats, say),
        }
        found = {}
        for name in only or PARTS:
            began = time.perf_counter()
            words, found[name] = parts[name]()
            say(f"-- {name}: {time.perf_counter() - began:.0f} s")
            if document:
                insert(document, name, words)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="name, model folder or Hugging Face id (default: mini)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each schedule, from 1 (default: 3)")
    parser.add_argument("--all", action="store_true", help="everything that docs/performance.md shows")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help=f"with --all: {', '.join(PARTS)}")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="with --all: put the parts there, and the plot beside it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    options = parser.parse_args()

    def say(words: str) -> None:
        print(words, flush=True)

    try:
        if options.all:
            found: Any = everything(options.repeats, options.write, options.only, say)
        else:
            found = samplers(options.model, options.repeats, say)[1]
    except ValueError as error:
        sys.exit(f"error: {error}")
    if options.json:
        with written(options.json) as partial:
            partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
