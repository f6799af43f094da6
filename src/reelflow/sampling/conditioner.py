"""The one parameter function under every sampling schedule.

Shapes: B batch, n tokens of a pass, T tokens, C latent channels, L text tokens, E text channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelflow.flow import Affine, guide
from reelflow.flow.block import FlowBlock
from reelflow.flow.rope import Rotary


class Conditioner:
    """(shift, scale) of places `start … start + n − 1`, given the tokens that stand before them.

    Keys and values of the tokens given are kept, so every call extends (or overwrites) what later calls see. Text is
    read once, when the conditioner is made. With guidance, `text_BLE` holds the conditional texts, then the
    unconditional ones (2B, L, E), and both run in one batch.
    """

    def __init__(self, block: FlowBlock, rotary: Rotary | None, batch: int, places: int, text_BLE: Tensor | None, guidance: float):
        self.block, self.rotary, self.guidance = block, rotary, guidance
        rows = 2 * batch if guidance else batch
        self.text = 0
        if block.proj_text is None or text_BLE is None:
            self.cache = block.new_cache(rows, places)
            return
        assert len(text_BLE) == rows, "guidance takes the conditional and the unconditional texts"
        self.text = text_BLE.shape[1]
        self.cache = block.new_cache(rows, self.text + places)
        self._run(block.proj_text(text_BLE), 0)

    def _run(self, hidden: Tensor, at: int) -> Tensor:
        rotary = self.rotary and self.rotary.rows(at, hidden.shape[1])
        return self.block.run(hidden, rotary, self.cache.at(at))

    def __call__(self, inputs_BnC: Tensor, start: int) -> Affine:
        """`inputs_BnC`: the tokens before each of the places asked for (the start token before place 0), in block order."""
        hidden = self.block.embed(inputs_BnC, start - self.block.first)
        if self.guidance:
            hidden = torch.cat((hidden, hidden))
        found = self.block.read(self._run(hidden, self.text + start - self.block.first))
        if not self.guidance:
            return found
        conditional, unconditional = (Affine(*pair) for pair in zip(*(part.chunk(2) for part in found), strict=True))
        return guide(conditional, unconditional, self.guidance)
