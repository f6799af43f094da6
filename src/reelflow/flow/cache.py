"""Keys and values of the tokens a block has read: rotated once, written in place, never copied.

Shapes: B batch rows, H key heads, n tokens of a pass, K slots, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelflow.flow.attention import Attend, attention


class KVCache:
    """Room for `slots` tokens in every layer, (layers, B, K, H, D).

    Writing at a slot again overwrites it, so a pass over a window can be repeated: nothing has to be rewound.
    """

    def __init__(self, layers: int, rows: int, heads: int, slots: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        shape, self.dtype = (layers, rows, slots, heads, head_dim), dtype
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # a slot not written yet is masked, but must not be NaN
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.first_B1 = torch.arange(0, rows * slots, slots, device=device)[:, None]

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    def at(self, slot_Bn: Tensor, seen_BnK: Tensor) -> list[Attend]:
        """One attention per layer for the tokens of a pass: writes their keys and values at `slot_Bn`, then every query
        sees the slots that `seen_BnK` (bool, over the first K slots) marks for it. Both broadcast over the rows.
        """
        index = (self.first_B1 + slot_Bn).flatten()
        used = seen_BnK.shape[-1]
        # Added to the products, made once: every layer would turn marks into this again.
        mask = torch.zeros(seen_BnK.shape, dtype=self.dtype, device=seen_BnK.device).masked_fill_(~seen_BnK, -torch.inf)[:, None]

        def attend(layer: int) -> Attend:
            return lambda q_BHTD, k_BHTD, v_BHTD: attention(q_BHTD, *self.write(layer, index, (k_BHTD, v_BHTD), used), mask)

        return [attend(layer) for layer in range(len(self.keys))]

    def write(self, layer: int, index: Tensor, new: tuple[Tensor, Tensor], used: int) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of a pass, (B, H, n, D) each, at `index` of all rows' slots; those of the first `used` slots."""
        both = self.keys[layer], self.values[layer]
        for store_BKHD, new_BHnD in zip(both, new, strict=True):
            store_BKHD.flatten(0, 1).index_copy_(0, index, new_BHnD.transpose(1, 2).flatten(0, 1).to(store_BKHD.dtype))
        return both[0][:, :used].transpose(1, 2), both[1][:, :used].transpose(1, 2)
