"""One pass after the other without the host: on a GPU, passes are recorded once and replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class Replay:
    """Runs a function of tensors that are changed in place, the same way every time for the same key.

    On a GPU the first run for a key is an ordinary one, the second is recorded while nothing is computed, and from then on
    the recording is replayed: one launch for the host instead of some hundreds. Elsewhere it is just run. Keys are held
    as long as their recordings, which use the memory of what they name.
    """

    def __init__(self, device: torch.device):
        self.recorded: dict[Hashable, torch.cuda.CUDAGraph | None] | None = {} if device.type == "cuda" else None
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # one, for they never run side by side

    def __call__(self, key: Hashable, run: Callable[[], None]) -> None:
        if self.recorded is None or key not in self.recorded:
            if self.recorded is not None:
                self.recorded[key] = None
            run()
            return
        graph = self.recorded[key]
        if graph is None:
            graph = self.recorded[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                run()
        graph.replay()
