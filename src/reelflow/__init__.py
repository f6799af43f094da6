"""reelflow: video by normalizing flows and latent diffusion.

>>> import reelflow
>>> pipe = reelflow.load("mini")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reelflow.version import VERSION

__version__ = VERSION
__all__ = ["Clip", "Encoding", "Pipeline", "Score", "__version__", "load"]

if TYPE_CHECKING:
    from reelflow.clip import Clip
    from reelflow.pipelines import Encoding, Pipeline, Score, load


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import reelflow` stays quick."""
    if name == "Clip":
        from reelflow.clip import Clip

        return Clip
    if name in __all__:
        from reelflow import pipelines

        return getattr(pipelines, name)
    raise AttributeError(f"module 'reelflow' has no attribute {name!r}")
