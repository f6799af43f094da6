"""Make `mini-svd` from nothing: its VAE, latents of toybox clips, its UNet, the model folder.

    python examples/mini_svd.py                      # all of it, in one process
    python examples/mini_svd.py --processes 2        # one thread each: best on a busy CPU

Stopped at any time, the same command goes on where it was. The result is runs/mini_svd/model; settings of the UNet's training
(examples/mini_svd.yaml) may follow as key=value.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).with_suffix(".yaml")
VAE = Path("runs/svd-vae/vae")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="that share the work, 1 … (default: 1)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of the UNet's training")
    options = parser.parse_args()
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(options.processes)] if options.processes > 1 else []
    steps = [
        ["-m", "reelflow.training.svd.vae", VAE.parent, "--export", VAE],
        ["-m", "reelflow", "train", "prepare", CONFIG, *options.settings],
        ["-m", "reelflow", "train", CONFIG, *options.settings],
    ]
    for step in steps[(VAE / "config.json").is_file() :]:
        if code := subprocess.call([sys.executable, *several, *map(str, step)]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
