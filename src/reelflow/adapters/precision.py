"""Precisions of a flow's transformer layers: which there are, which one suits a machine, and weights in them.

    float32   as published
    bfloat16  weights and products in 16 bits
    int8      weights in 8 bits with a scale per output, products in bfloat16
    int4      weights in 4 bits with a scale and a zero per 64, products in bfloat16
    fp8       weights and activations in 8-bit floating point (e4m3), each row of both with a scale of its own

Only the products inside the flow's layers are meant. In and out projections, norms, residual and the affine map stay float32, and the
denoiser is never below bfloat16. All of torchao's work (extra `quantize`). A token's values depend on no other token
of its pass in any of them, so that a window of tokens at once has the sequential sample as its fixed point; but rounding makes
the map coarse, and a tolerance below its grain is never met (see `sampling.Schedule`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch
    from torch import nn

    from reelflow.flow import StarFlow

Precision = Literal["auto", "float32", "bfloat16", "int8", "int4", "fp8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
QUANTISED = ("int8", "int4", "fp8")
GROUP = 64
"""int4: weights that share a scale. On mini 64 is as exact as 32, and twice as exact as 128."""
LARGE = 50_000_000
"""Parameters from which bfloat16 pays, where a machine is fast in it. Measured on a CPU with AMX (`benchmarks/precisions.py`):
not for mini's 6 million, 2.6 times as fast for 60."""
NOISY = ("torchao", "torch.utils._pytree")


def settle(asked: str, device: str | torch.device, parameters: int) -> str:
    """The precision that `asked` is for a model of so many parameters on that device.

    `auto` is bfloat16 for a large model where products in it are fast: a GPU from compute capability 8.0 on, a CPU with AMX or
    AVX-512 bf16. All else is float32: a small model gains nothing, and a seed then means the same clip everywhere.

    Raises:
        ValueError: a precision that does not exist, that the device cannot compute in, or for which torchao is missing.
    """
    import torch

    device = torch.device(device)
    if asked not in PRECISIONS:
        raise ValueError(f"precision {asked!r} is not one of {', '.join(PRECISIONS)}")
    if asked == "auto":
        return "bfloat16" if parameters >= LARGE and fast_bfloat16(device) else "float32"
    if asked in QUANTISED:
        _require(asked, device)
    return asked


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster there than in float32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases do not say
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def _require(name: str, device: torch.device) -> None:
    """Raise ValueError where `name` cannot be had."""
    import torch

    if find_spec("torchao") is None:
        raise ValueError(f"precision {name} needs torchao; install it with: pip install 'reelflow[quantize]'")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"precision {name} does not run on {device.type}; use float32, bfloat16, or another device")
    least = {"int8": (0, 0), "int4": (8, 0), "fp8": (8, 9)}[name]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < least:
        name_of, has = torch.cuda.get_device_name(device), ".".join(map(str, torch.cuda.get_device_capability(device)))
        need = ".".join(map(str, least))
        raise ValueError(f"precision {name} needs compute capability {need}, {name_of} has {has}; use int8")


def compute_dtype(precision: str) -> torch.dtype:
    """What the layers' products are computed in, and their keys and values kept in."""
    import torch

    return torch.float32 if precision == "float32" else torch.bfloat16


def quantiser(flow: StarFlow, precision: str, device: str | torch.device) -> Callable[[str, nn.Module], None] | None:
    """A function that brings a module of `flow`, given with its name, to `precision` once its weights are there; None for nothing to do.

    Raises:
        ValueError: layers of a width that this precision cannot take.
    """
    import torch
    from torch import nn

    if precision not in QUANTISED:
        return None
    unit = {"int8": 1, "int4": GROUP, "fp8": 16}[precision]
    chosen = {name for name, module in flow.named_modules() if isinstance(module, nn.Linear) and quantised(name)}
    odd = sorted({module.in_features for name, module in flow.named_modules() if name in chosen and module.in_features % unit})
    if odd:
        raise ValueError(f"precision {precision} takes widths that are a multiple of {unit}, this model has layers of {odd[0]}; use int8")
    where = torch.device(device)

    def quantise(name: str, module: nn.Module) -> None:
        if name in chosen:
            with quiet():
                _quantise(module, precision, where)

    return quantise


def quantised(name: str) -> bool:
    """Whether a linear module of that name is one of the flow's transformer layers."""
    return ".layers." in name and not name.startswith("denoiser.")


def _quantise(linear: nn.Module, precision: str, device: torch.device) -> None:
    from torch import nn
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, PerRow, quantize_  # type: ignore[import-untyped]
    from torchao.quantization.quantize_.workflows import Float8Tensor, Int4PackingFormat, QuantizeTensorToFloat8Kwargs  # type: ignore[import-untyped]

    if precision == "fp8":  # what Float8DynamicActivationFloat8WeightConfig does, which refuses CPUs although they can
        from torchao.float8.inference import Float8MMConfig  # type: ignore[import-untyped]

        rows: dict[str, Any] = {"granularity": PerRow(), "hp_value_lb": 1e-12}  # a row of zeros needs a scale, too
        weight = Float8Tensor.from_hp(
            linear.weight, **rows, mm_config=Float8MMConfig(use_fast_accum=True), act_quant_kwargs=QuantizeTensorToFloat8Kwargs(**rows)
        )  # fmt: skip
        linear.weight = nn.Parameter(weight, requires_grad=False)
    elif precision == "int8":
        quantize_(linear, Int8WeightOnlyConfig(set_inductor_config=False))
    elif device.type == "cpu":  # the kernel for CPUs is there, its configuration has not left the prototypes
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # type: ignore[import-untyped]

        quantize_(linear, PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False))
    else:
        tiles = Int4PackingFormat.TILE_PACKED_TO_4D
        quantize_(linear, Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format=tiles, set_inductor_config=False))


def weight_bytes(precision: str, rows: int, columns: int, device: str = "cpu") -> int:
    """Bytes of a weight (rows, columns) of a layer in that precision on that type of device, scales included."""
    if precision == "float32":
        return 4 * rows * columns
    if precision == "bfloat16":
        return 2 * rows * columns
    if precision == "int8":
        return rows * columns + 5 * rows  # scale float32, zero int8
    if precision == "fp8":
        return rows * columns + 4 * rows
    if device != "cpu":  # its kernel works on tiles
        rows, columns = -(-rows // 8) * 8, -(-columns // 1024) * 1024
    return rows * columns // 2 + rows * (columns // GROUP) * 4


@contextmanager
def quiet() -> Iterator[None]:
    """What torchao logs when it is imported is for its developers."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
