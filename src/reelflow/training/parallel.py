"""Ranks: who holds which part of the weights, and what they tell each other.

The matrices of the transformer layers may be sharded (FSDP2): a layer's are gathered when it runs, in bfloat16 where the
products are, and their gradients are averaged in float32 back into shards. Everything else (norms, in and out projections,
start tokens, a trained text encoder, adapters: well under a hundredth of a large model) is on every rank, as all of it is where nothing
is sharded, and its gradients are averaged in one message.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from reelflow.adapters.torchrun import TOLD, own_device
from reelflow.flow import StarFlow
from reelflow.flow.attention import Layer
from reelflow.training.attention import attend_quickly
from reelflow.training.config import RunConfig
from reelflow.training.foresight import ForeseeingFlow

PATIENCE = 5.0
"""Seconds."""


class LostRankError(RuntimeError):
    """Another process of the run is gone."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    mesh: of the ranks that hold the layers' matrices together, None where each holds all. words, files: groups over the CPU,
    of the loop, and of what writes checkpoints beside it.
    """

    device: torch.device
    rank: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None
    words: dist.ProcessGroup | None = None
    files: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Of a few numbers, over all ranks."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def average(self, gradients: list[Tensor]) -> None:
        """The mean over ranks of gradients that every rank has in full, in place."""
        if self.count == 1 or not gradients:
            return
        mean = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def agree(self, value: Any) -> Any:
        """What the first rank says (any small object)."""
        said = [value]
        if self.count > 1:
            dist.broadcast_object_list(said, src=0, group=self.words)
        return said[0]

    def meet(self) -> None:
        if self.count > 1:
            dist.barrier(self.words)


def join(config: RunConfig) -> Ranks:
    """Find the other processes that torchrun started, if it did.

    Raises:
        ValueError: `shards` does not divide the ranks, or a device that cannot be every rank's own.
    """
    started = os.environ.keys() >= TOLD
    try:
        device = torch.empty(0, device=own_device(config.device)).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {config.device!r} cannot be used here ({str(error).splitlines()[0][:100]}); use cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if (started or config.offload) and not dist.is_initialized():
        alone: dict[str, Any] = {} if started else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=config.timeout), **alone)
    if not dist.is_initialized():
        return Ranks(device)
    rank, count = dist.get_rank(), dist.get_world_size()
    shards = config.shards or (count if device.type == "cuda" else 1)
    if count % shards:
        raise ValueError(f"shards = {shards} does not divide the {count} ranks of this run")
    mesh = None
    if shards > 1 or config.offload:
        shape, names = ((shards,), ("shard",)) if shards == count else ((count // shards, shards), ("replicate", "shard"))
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    words, files = (dist.new_group(backend="gloo", timeout=timedelta(minutes=config.timeout)) for _ in range(2))
    return Ranks(device, rank, count, mesh, words, files)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def precision(config: RunConfig, device: torch.device) -> AbstractContextManager[Any]:
    """In which products are computed."""
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bfloat16" else nullcontext()


def layers(flow: StarFlow) -> list[Layer]:
    return [module for module in flow.modules() if isinstance(module, Layer)]


def prepare_layers(flow: StarFlow, config: RunConfig) -> None:
    """Compile layers and recompute their insides on the way back, as configured; on CPUs let their attention be the quicker one."""
    for layer in layers(flow):
        if config.device == "cpu" and not config.compile:
            attend_quickly(layer)
        run: Any = layer.forward
        if config.compile:
            run = torch.compile(run)
        if config.recompute:
            run = functools.partial(torch.utils.checkpoint.checkpoint, run, use_reentrant=False)
        if run is not layer.forward:
            layer.forward = run  # type: ignore[method-assign]  # on this layer only; names of weights stay


def shard(flow: ForeseeingFlow, config: RunConfig, mesh: DeviceMesh) -> None:
    """Share the matrices of the layers among the ranks of the mesh, in place; see the top of the file."""
    matrices = {
        parameter
        for layer in layers(flow)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
        for parameter in module.parameters(recurse=False)
    }
    everywhere = {parameter for parameter in flow.parameters() if parameter not in matrices}
    low = torch.bfloat16 if config.precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if config.offload else OffloadPolicy()
    for module in (*layers(flow), flow):
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload, ignored_params=everywhere)
    for method in ("score", "foreseen"):
        register_fsdp_forward_method(flow, method)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, itself where it is not sharded; in place changes of it are changes of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of it, on every rank that asks; all have to."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor, whole or this rank's shard of it, what a whole one holds that every rank has."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    local(tensor).copy_(value)


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Of all values together, over all shards. Scalar."""
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for gradient in gradients:
        parts[isinstance(gradient, DTensor)].append(gradient)
    norms = [full(nn.utils.get_total_norm(some)) for some in parts.values() if some]
    return norms[0] if len(norms) == 1 else torch.stack([norm.to(norms[0].device) for norm in norms]).norm() if norms else torch.zeros(())


@contextmanager
def answering(where: Callable[[], str]) -> Iterator[None]:
    """Raise LostRankError where a rank does not answer while the block talks to it; `where`: says what is safe."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        words = " ".join(str(error).split())
        if not any(sign in words for sign in ("gloo", "NCCL", "Connection", "connection", "Timed out", "timed out")):
            raise
        raise LostRankError(f"another process of this run is gone or does not answer ({words[:160]}); {where()}") from error


def tell_when_ended(where: Callable[[], str]) -> None:
    """On SIGTERM, which torchrun sends where another rank has failed, stop as for Ctrl-C; where that does not come about within
    `PATIENCE`, because a collective waits on the GPU, say where the run stands and leave. `where`: called for the words.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop)
    seen, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)  # written to at once, whatever the main thread waits for

    def wait() -> None:
        while os.read(seen, 1) != bytes([signal.SIGTERM]):
            pass
        time.sleep(PATIENCE)
        sys.stderr.write(f"stopped from outside (torchrun does so where another rank has failed): {where()}\n")
        sys.stderr.flush()
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
