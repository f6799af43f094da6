"""The border to torchrun, which starts a program as several processes and tells each its number in the environment."""

from __future__ import annotations

import os
from math import gcd

import torch
import torch.distributed as dist

from reelflow.config import FlowConfig
from reelflow.flow.parallel import Ranks

TOLD = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


def own_device(asked: str | torch.device) -> str | torch.device:
    """The device of this process: as asked, but under torchrun `cuda` is the GPU of the process's own number.

    Raises:
        ValueError: a device that all processes of the machine would share, or more processes than GPUs.
    """
    if not os.environ.keys() >= TOLD or str(asked).partition(":")[0] not in ("cuda", "mps"):
        return asked
    if str(asked) != "cuda":
        raise ValueError(f"device {str(asked)!r} is the same for all processes of torchrun; give cuda (each takes a GPU of its own) or cpu")
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if 0 < gpus <= local:
        raise ValueError(f"process {local + 1} here has no GPU of its own, there are {gpus}; use torchrun --nproc-per-node {gpus}, or cpu")
    return f"cuda:{local}"


def join(device: str | torch.device) -> int:
    """Under torchrun, meet the other processes: over NCCL where they compute on GPUs, else over gloo. How many there are."""
    if os.environ.keys() >= TOLD and not dist.is_initialized():
        device = torch.device(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    return dist.get_world_size() if dist.is_initialized() else 1


def counts(config: FlowConfig) -> list[int]:
    """The numbers of processes that can share a model: 1, and with text 2 for the branches of guidance × what divides its heads."""
    heads = config.num_heads or config.deep_width // config.head_dim
    most, branches = gcd(heads, config.num_kv_heads or heads, 4 * config.deep_width), 2 if config.text_tokens else 1
    return sorted({1, *(branches * share for share in range(1, most + 1) if most % share == 0)})


def ranks(config: FlowConfig, device: str | torch.device) -> Ranks:
    """All processes that have joined, as those of one model. Raises ValueError for a number of them that cannot share it."""
    size = join(device)
    if size == 1:
        return Ranks()
    if size not in counts(config):
        *some, last = map(str, counts(config))
        words = f"{', '.join(some)} or {last}" if some else last
        raise ValueError(f"{size} processes cannot share this model; start {words} of them (torchrun --nproc-per-node)")
    branches = 2 if config.text_tokens else 1
    return Ranks(branches, size // branches, dist.get_rank(), device)
