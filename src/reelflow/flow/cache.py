"""Keys and values of the tokens a block has read: rotated once, written in place, never copied.

Shapes: B batch rows, H key heads, n tokens of a pass, K slots, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelflow.flow.attention import Attend, attention


class KVCache:
    """Room for `slots` tokens in every layer.

    Writing at a slot again overwrites it, so a pass over a window can be repeated: nothing has to be rewound.
    """

    def __init__(self, layers: int, rows: int, heads: int, slots: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        shape = (layers, rows, heads, slots, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # a slot not written yet is masked, but must not be NaN
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def slots(self) -> int:
        return self.keys.shape[3]

    def at(self, slot_Bn: Tensor, seen_BnK: Tensor) -> list[Attend]:
        """One attention per layer for the tokens of a pass: writes their keys and values at `slot_Bn`, then every query
        sees the slots that `seen_BnK` (bool, over the first K slots) marks for it. Both broadcast over the rows.
        """
        rows, heads, _, width = self.keys.shape[1:]
        index = slot_Bn[:, None, :, None].expand(rows, heads, -1, width)
        mask, used = seen_BnK[:, None], seen_BnK.shape[-1]

        def attend(layer: int) -> Attend:
            keys, values = self.keys[layer], self.values[layer]

            def run(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
                keys.scatter_(2, index, k_BHTD.to(keys.dtype))
                values.scatter_(2, index, v_BHTD.to(values.dtype))
                return attention(q_BHTD, keys[:, :, :used], values[:, :, :used], mask)

            return run

        return [attend(layer) for layer in range(len(self.keys))]
