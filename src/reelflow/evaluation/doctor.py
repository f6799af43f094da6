"""What this machine can run, and what would be chosen on it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from reelflow.version import VERSION

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "huggingface-hub", "av", "Pillow", "numpy", "typer", "rich", "pydantic")
CPU_FEATURES = {"AVX2": "avx2", "AVX-512": "avx512f", "AVX-512 bf16": "avx512_bf16", "AMX bf16": "amx_bf16", "AMX int8": "amx_int8"}
"""What PyTorch's kernels make use of: name → flag in /proc/cpuinfo."""


def examine() -> dict[str, dict[str, Any]]:
    """Topic → findings, JSON-able: system, processor, memory, gpu, libraries, encoders, models, chosen."""
    from reelflow.adapters.hub import packaged

    gpus = _gpus()
    return {
        "system": {"reelflow": VERSION, "python": platform.python_version(), "platform": platform.platform()},
        "processor": _processor(),
        "memory": _memory(),
        "gpu": gpus or {"found": "none that PyTorch can use"},
        "libraries": {name: _version(name) for name in LIBRARIES},
        "encoders": _encoders(),
        "models": {"packaged": list(packaged())},
        "chosen": _chosen("cuda" if gpus.get("cuda:0") else "cpu"),
    }


def _processor() -> dict[str, Any]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {
        "cores": usable,
        "threads of PyTorch": torch.get_num_threads(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {"name": platform.processor() or platform.machine(), **found}
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    features = [name for name, flag in CPU_FEATURES.items() if flag in flags]
    return {"name": facts.get("model name", platform.machine()), **found, "features": features}


def _memory() -> dict[str, str]:
    """Of the machine, or less where a control group limits it."""
    from reelflow.pipelines.offload import host_memory

    total = host_memory()
    return {"total": f"{total / 2**30:.1f} GiB" if total else "not known here"}


def _gpus() -> dict[str, str]:
    import torch

    found = {}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        bf16 = "bfloat16" if about.major >= 8 else "no fast bfloat16"
        found[f"cuda:{index}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {bf16}"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _encoders() -> dict[str, str]:
    """Kind of file → the encoder that would write it."""
    import av

    from reelflow.media.write import VIDEO_FORMS

    kinds = {
        suffix: next((name for name in form.encoders if name in av.codecs_available), "missing") for suffix, form in VIDEO_FORMS.items()
    }
    return {**kinds, ".png": "Pillow"}


def _chosen(device: str) -> dict[str, str]:
    import torch

    from reelflow.adapters.precision import LARGE, settle

    found = {"device": device, "precision": settle("auto", device, 0), "of large flows": settle("auto", device, LARGE)}
    if device == "cpu":
        return found | {"advice": "no GPU: use the small packaged models; the published ones of 3 and 7 billion parameters want a GPU"}
    size = torch.cuda.get_device_properties(0).total_memory // 10**9
    return found | {"advice": f"published models: --memory-budget {size}GB picks the best precision and placement that fit this GPU"}
