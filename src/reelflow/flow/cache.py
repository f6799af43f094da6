"""Keys and values of the tokens a block has read: rotated once, written in place, never copied.

Shapes: B batch, H key heads, T tokens, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelflow.flow.attention import Attend, causal_after


class KVCache:
    """Room for `length` tokens in every layer. One per request and block; overflow is an error.

    Writing at a place again overwrites it, so a pass over a window can be repeated: nothing has to be rewound.
    """

    def __init__(self, layers: int, batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        shape = (layers, batch, heads, length, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def at(self, start: int) -> list[Attend]:
        """One attention per layer for queries at places `start …`: writes their keys, then sees all places up to each query."""

        def attend(layer: int) -> Attend:
            keys, values = self.keys[layer], self.values[layer]

            def run(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
                end = start + k_BHTD.shape[2]
                if end > keys.shape[2]:
                    raise ValueError(f"the cache holds {keys.shape[2]} tokens, {end} asked for; make it that long")
                keys[:, :, start:end] = k_BHTD
                values[:, :, start:end] = v_BHTD
                return causal_after(q_BHTD, keys[:, :, :end], values[:, :, :end])

            return run

        return [attend(layer) for layer in range(len(self.keys))]
