"""Speed and exactness of every sampling schedule: `python benchmarks/sampling.py [--model mini] [--json out.json]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from reelflow.evaluation.bench import run, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini", help="name, model folder or Hugging Face id (default: mini)")
    parser.add_argument("--device", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the layers (default: float32)")
    parser.add_argument("--tolerances", type=float, nargs="+", default=(1e-2, 1e-3, 1e-4), help="0 … 0.1 (default: 0.01 0.001 0.0001)")
    parser.add_argument("--windows", type=int, nargs="+", default=(16, 32, 64), help="tokens, from 1 (default: 16 32 64)")
    parser.add_argument("--frames", type=int, help="video frames (default: the trained length, which is also the most)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each schedule, from 1 (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    options = vars(parser.parse_args())
    path = options.pop("json")
    try:
        found = run(**options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(table(found))
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
