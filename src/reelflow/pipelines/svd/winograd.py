"""3 × 3 convolutions with half the products: Winograd's minimal filtering F(4, 3), down the rows.

Four rows of a result need six products a column instead of twelve: of six sums of six rows with six sums of the kernel's three
(interpolation at 0, ±1, ±2 and ∞; Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308). What the kernel
does along a row stays a convolution. Results are rounded about three times as much as those of the usual sum, in float32 still 3e-5 of
their spread at most. Across columns too it would save more, but its sums then take the time that it saves.

Shapes: N images, H rows, W columns, C channels in, K out; channels last in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 4
SUMS = (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1)
"""What the six sums of a kernel's rows take of each."""


def pays(x_NCHW: Tensor, weight_KC33: Tensor) -> bool:
    """Whether it is quicker: in float32 on a CPU, with work enough to make up for the kernel's sums, and few rows lost to the last four."""
    rows, places = x_NCHW.shape[2], x_NCHW[:, 0].numel()
    return (
        x_NCHW.device.type == "cpu"
        and x_NCHW.dtype == torch.float32
        and min(weight_KC33.shape[:2]) >= 32
        and places >= 1024
        and 2 * places * weight_KC33.numel() >= 10**9
        and 4 * rows >= 3 * (rows + -rows % ROWS)
    )


def convolve(x_NCHW: Tensor, weight_KC33: Tensor, bias_K: Tensor, step: int) -> Tensor:
    """(N, K, H, W), with a border of zeros. The kernel's sums are made anew at every call, a few hundredths of its work: kept, they
    would be twice as large as the kernel.

    Args:
        step: rows to work on at a time, of one image or of several: about four times as many are held between the products.
    """
    out_NHWK = x_NCHW.new_empty(len(x_NCHW), *x_NCHW.shape[2:], len(bias_K))
    sums_6KC13 = weight_KC33.new_tensor(SUMS) @ weight_KC33.permute(2, 0, 3, 1).flatten(1)
    sums_6KC13 = sums_6KC13.unflatten(1, (len(bias_K), 1, 3, -1)).permute(0, 1, 4, 2, 3)
    for rows_NHWC, place_NHWK in _strips(x_NCHW.permute(0, 2, 3, 1), out_NHWK, max(ROWS, step - step % ROWS)):
        _strip(rows_NHWC, sums_6KC13, bias_K, place_NHWK)
    return out_NHWK.permute(0, 3, 1, 2)


def _strips(x_NHWC: Tensor, out_NHWK: Tensor, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows that a part of the result comes from, one more above and below it, up to the last of four; and that part."""
    rows = x_NHWC.shape[1]
    images = max(1, step // rows)
    for x, out in zip(x_NHWC.split(images), out_NHWK.split(images), strict=True):
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            above, below = int(start == 0), (1 + -stop % ROWS) * int(stop == rows)
            part = x[:, start - 1 + above : stop + 1]
            yield F.pad(part, (0, 0, 0, 0, above, below)) if above or below else part, out[:, start:stop]


def _strip(x_NHWC: Tensor, sums_6KC13: Tensor, bias_K: Tensor, out_NHWK: Tensor) -> None:
    end = x_NHWC.shape[1] - ROWS - 1
    x0, x1, x2, x3, x4, x5 = (x_NHWC[:, first : first + end : ROWS] for first in range(6))
    even, odd = torch.sub(x4, x2, alpha=4), torch.sub(x3, x1, alpha=4)
    wide, near = x4 - x2, x3 - x1
    rows = (
        (even - x2).add_(x0, alpha=4), even + odd, even - odd, torch.add(wide, near, alpha=2), torch.sub(wide, near, alpha=2),
        (x5 - x3).sub_(near, alpha=4),
    )  # fmt: skip
    y0, y1, y2, y3, y4, y5 = (
        F.conv2d(row.permute(0, 3, 1, 2), kernel, bias_K if index == 1 else None, padding=(0, 1)).permute(0, 2, 3, 1)
        for index, (row, kernel) in enumerate(zip(rows, sums_6KC13, strict=True))  # the second is in all four rows once
    )
    even, odd, wide, near = y1 + y2, y1 - y2, y3 + y4, y3 - y4
    for row, (first, second, factor) in enumerate(((y0.add_(even), wide, 1), (odd, near, 2), (even, wide, 4), (y5.add_(odd), near, 8))):
        place = out_NHWK[:, row::ROWS]
        torch.add(first[:, : place.shape[1]], second[:, : place.shape[1]], alpha=factor, out=place)


__all__ = ["convolve", "pays"]
