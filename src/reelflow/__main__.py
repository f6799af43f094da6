"""`python -m reelflow`: the command line, where no console script is installed (and under torchrun)."""

from reelflow.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
