"""The one parameter function under every sampling schedule, and its memory of what it has read.

A place is a token's position in a block's sequence: 0 … for the video, −L … −1 for the text in front of it. The network's
input at place p is the token before it (the start token at place 0), and gives the parameters of token p.

Shapes: B clips, n tokens of a pass, C latent channels, L text tokens, E text channels, K slots of the cache, D channels of a head.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from reelflow.flow import Affine, StarFlow, guide
from reelflow.flow.block import FlowBlock
from reelflow.flow.parallel import Exchange, Ranks
from reelflow.flow.rope import Rotary

MASK_ROWS = 256  # tokens read in one pass at most, so that no mask is larger than 256 × keys


class Conditioner:
    """(shift, scale) of places, given the tokens that stand before them, of B clips of one block.

    Keys and values of the tokens given are kept, so every call extends (or overwrites) what later calls see. With guidance
    the conditional and the unconditional branch run as one batch of 2B.

    Args:
        size: (h, w), places of a frame.
        places: how many the cache has room for.
    """

    def __init__(self, model: StarFlow, block: FlowBlock, batch: int, size: tuple[int, int], places: int, guidance: float = 0.0):
        self.model, self.block, self.size, self.guidance = model, block, size, guidance
        self.text = model.config.text_tokens if block.proj_text is not None else 0
        ranks, branches = model.ranks if block is model.deep_block else Ranks(), 2 if guidance else 1
        values = 2 * batch * MASK_ROWS * model.config.channels
        self.exchange = Exchange(ranks, branches, values * branches, block.proj_out.weight)
        self.rows = branches * batch // self.exchange.split
        self.device = block.proj_in.weight.device
        self.cache = block.new_cache(self.rows, self.text + places)

    def read_text(self, text_BLE: Tensor | None) -> None:
        """Read text states, or read others instead; with guidance the conditional ones, then the unconditional ones (2B, L, E)."""
        if self.block.proj_text is None or text_BLE is None:
            return
        assert len(text_BLE) == self.rows * self.exchange.split, "guidance takes the conditional and the unconditional texts"
        hidden, place = self.block.proj_text(self.exchange.own(text_BLE)), torch.arange(-self.text, 0, device=self.device)[None]
        for some, at in zip(hidden.split(MASK_ROWS, 1), place.split(MASK_ROWS, 1), strict=True):
            self._run(some, at, 0)

    def __call__(self, inputs_BnC: Tensor, place_Bn: Tensor, used: int) -> Affine:
        """Parameters of the places, (B, n, C).

        Args:
            inputs_BnC: the tokens before each of the places (the start token before place 0), in block order.
            place_Bn: (B, n), or (1, n) for all clips alike.
            used: no place is `used` or more, so that no more of the cache is looked at.
        """
        place = place_Bn - self.block.first
        hidden = self.block.embed(inputs_BnC, place)
        if len(hidden) != self.rows:
            hidden = torch.cat((hidden, hidden))
        found = self.exchange(self.block.read(self._run(hidden, place, used)))
        if not self.guidance:
            return found
        conditional, unconditional = (Affine(*pair) for pair in zip(*(part.chunk(2) for part in found), strict=True))
        return guide(conditional, unconditional, self.guidance)

    def slots(self, place_Bn: Tensor, used: int) -> tuple[Tensor, Tensor]:
        """Where in the cache the keys of these places go, (B, n), and which slots each of them sees, (B, n, K)."""
        held = torch.arange(-self.text, used, device=self.device)
        return place_Bn + self.text, held <= place_Bn[..., None]

    @cached_property
    def table(self) -> Rotary | None:
        """Rotations of every slot's place."""
        return self.model.rotary(torch.arange(self.cache.slots, device=self.device) - self.text, self.size, bool(self.text))

    def rotary(self, place_Bn: Tensor) -> Rotary | None:
        return self.table and Rotary(self.table.turn[place_Bn + self.text], self.table.halves)

    def _run(self, hidden: Tensor, place: Tensor, used: int) -> Tensor:
        (slot, seen), rotary = self.slots(place, used), self.rotary(place)
        if rotary is not None:
            rotary = Rotary(self._each(rotary.turn)[:, None], rotary.halves)
        return self.block.run(hidden, rotary, self.cache.at(self._each(slot), self._each(seen)))

    def _each(self, x: Tensor) -> Tensor:
        """What holds for every clip, for both branches of each; what holds for all alike stays one row."""
        return x if len(x) in (1, self.rows) else torch.cat((x, x))


class Ring(Conditioner):
    """A cache of constant size for a video of any length. An approximation beyond `frames` + 1 frames.

    A place sees the text, the start token as an attention sink, the `frames` frames before its own, and its own frame up to
    itself, all with the keys and values they had when they were read. Frames keep their absolute time; text and start token
    are turned along instead, as if frames were counted from the oldest one seen: rotations depend on differences only.
    """

    def __init__(self, model: StarFlow, block: FlowBlock, batch: int, size: tuple[int, int], frames: int, guidance: float = 0.0):
        self.frames, self.stride = frames, size[0] * size[1]
        self.around = (frames + 2) * self.stride  # frames seen, the present one, and the one that a window reaches into
        super().__init__(model, block, batch, size, 1 + self.around, guidance)
        self.fixed = self.text + 1  # slots that stay: text and start token
        slot = torch.arange(self.cache.slots, device=self.device) - self.text
        self.held_BK = slot.where(slot < 1, torch.iinfo(slot.dtype).max).repeat(batch, 1)
        self.unturned = self.cache.keys[:, :, : self.fixed].clone()

    def read_text(self, text_BLE: Tensor | None) -> None:
        super().read_text(text_BLE)
        self.unturned[:, :, : self.text] = self.cache.keys[:, :, : self.text]

    def __call__(self, inputs_BnC: Tensor, place_Bn: Tensor, used: int) -> Affine:
        self._turn(place_Bn[:, :1])
        return super().__call__(inputs_BnC, place_Bn, used)

    def slots(self, place_Bn: Tensor, used: int) -> tuple[Tensor, Tensor]:
        slot = self.text + torch.where(place_Bn > 0, 1 + place_Bn % self.around, place_Bn)
        batch = len(self.held_BK)
        if used:
            self.held_BK.scatter_(1, slot.expand(batch, -1), place_Bn.expand(batch, -1))
        oldest = (place_Bn.div(self.stride, rounding_mode="floor") - self.frames) * self.stride
        held, place = self.held_BK[:, None], place_Bn[..., None]
        return slot.expand(batch, -1), (held <= place) & ((held >= oldest[..., None]) | (held <= 0))

    def rotary(self, place_Bn: Tensor) -> Rotary | None:
        return self.model.rotary(place_Bn, self.size, bool(self.text))  # there is no end to the places

    def _turn(self, first_B1: Tensor) -> None:
        """Turn text and start token to where they stand for the frame that a pass begins in."""
        passed = (first_B1.div(self.stride, rounding_mode="floor") - self.frames).clamp(min=0).float()
        rotary = self.model.rotation(torch.stack((passed * 0, passed * 0, passed), -1))
        if rotary is None:
            return
        still, turn = self._each(passed == 0)[:, :, None, None], Rotary(self._each(rotary.turn)[:, None], rotary.halves)
        keys = self.cache.keys[:, :, : self.fixed]
        self.unturned.copy_(torch.where(still, keys, self.unturned))
        keys.copy_(torch.where(still, keys, turn.rotate(self.unturned)))
