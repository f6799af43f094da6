"""Make a small model from nothing: its VAE, of mini_svd its CLIP tower, latents of toybox clips and pictures, the model folder,
of mini its adapter.

    python examples/make.py mini                        # or mini_svd; all of it in one process
    python examples/make.py mini --processes 2          # one thread each: best on a busy CPU

Stopped at any time, the same command goes on where it was. The result is runs/NAME/model; settings
of the last part (examples/NAME.yaml) may follow as key=value.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

POINTS = "--decoder-only --warmup 20 --foreground 8 --edges 0.25 --knee 0.3 --colours 0"
"""The decoder alone, its error that of the things' pixels rather than of edges."""
VAES = {
    "mini": (
        "reelflow.training.vae",
        [
            "--steps 1280",
            "--decoder-only --steps 5000 --learning-rate 1.5e-3 --foreground 8 --edges 1 --noise 0.1 --colours 0",
            f"{POINTS} --steps 3000 --learning-rate 1e-3 --noise 0.1",
            f"{POINTS} --steps 2200 --learning-rate 8e-4 --noise 0.1",
        ],
    ),
    "mini_svd": ("reelflow.training.svd.vae", ["", f"{POINTS} --steps 2600 --learning-rate 2e-3 --noise 0.2"]),
}
"""Trainer of a model's VAE, and the options of each of its runs; every run begins with what the one before made."""
ALONE = "reelflow.training.svd.tower"
"""A few minutes in one process."""


def commands(name: str, settings: list[str]) -> list[tuple[Path | None, list[str]]]:
    """Arguments of python, each with the file, or the folder with a config.json, that shows it is done (None: it sees for itself)."""
    trainer, runs = VAES[name]
    found: list[tuple[Path | None, list[str]]] = []
    vae = None
    for index, options in enumerate(runs):
        begin, folder = ["--init", str(vae)] if vae else [], Path(f"runs/{name}-vae-{index + 1}")
        vae = folder / "vae"
        found.append((vae, ["-m", trainer, str(folder), *begin, *options.split(), "--export", str(vae)]))
    own = []
    if name == "mini_svd":
        tower = Path(f"runs/{name}-tower")
        found.append((tower, ["-m", ALONE, str(tower)]))
        own = [f"image_encoder={tower}"]
    config = [str(Path(__file__).with_name(f"{name}.yaml")), f"vae={vae}", f"latents=runs/{name}-latents", *own, *settings]
    found.append((None, ["-m", "reelflow", "train", "prepare", *config]))
    found.append((None, ["-m", "reelflow", "train", *config, "--folder", f"runs/{name}"]))
    return found + (adapter(Path("runs/mini/model")) if name == "mini" else [])


def adapter(model: Path) -> list[tuple[Path | None, list[str]]]:
    """What mini has on top: trained from the model, and put into its folder."""
    made, trained = model / "transformer" / "adapter.safetensors", Path("runs/mini_circles/adapter.safetensors")
    config = str(Path(__file__).with_name("mini_circles.yaml"))
    return [
        (made, ["-m", "reelflow", "train", "prepare", config]),
        (made, ["-m", "reelflow", "train", config, "--folder", str(trained.parent)]),
        (made, [str(Path(__file__).with_name("coarsen.py")), str(trained), str(made)]),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(VAES))
    parser.add_argument("--processes", type=int, default=1, help="that share the work, 1 … (default: 1)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of the model's training")
    options = parser.parse_intermixed_args()
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(options.processes)] if options.processes > 1 else []
    for made, command in commands(options.name, options.settings):
        if made and (made.is_file() or (made / "config.json").is_file()):
            continue
        shared = command[0] == "-m" and command[1] != ALONE
        if code := subprocess.call([sys.executable, *(several if shared else []), *command]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
