"""The sampler that STARFlow-V was published with, written from its description, to measure ours against.

Fixed chunks: 32 tokens in the first frame, in the chunk that begins right behind it and in shallow blocks, 128 elsewhere,
across the ends of frames. A chunk is evaluated as a whole until the mean square of its change, over the batch, falls below a
share of its own mean square, 32 times at most. It starts from the noise, or, beyond the first frame, from what stands one
frame back, that frame's noise and the input that is known already included; where that reaches into the chunk itself, from
the noise. What a first pass changes is counted from the noise in any case, so none is ever enough.

Two engines run it. `own_engine` is the published one: the network in float32, a cache of keys that are not rotated yet, so
that every layer rotates the whole prefix again in every pass, and a dense mask of booleans made anew in every layer. What is
merely wasteful is left out (tables of cosines made anew, clips doubled behind the network), so it is no slower than it was.
The other is that of `reelflow.sampling`, which leaves the algorithms alone to be compared.

Shapes: B clips, N places, n places of a chunk, C latent channels, h × w places of a frame, K keys, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from reelflow.flow import Affine, StarFlow, from_tokens, guide, order, to_tokens
from reelflow.flow.attention import Attend, Layer, attention
from reelflow.flow.block import FlowBlock
from reelflow.flow.rope import Rotary
from reelflow.sampling import Report
from reelflow.sampling.conditioner import Conditioner

MOST, SMALL = 32, 32


@dataclass(frozen=True)
class Published:
    """tolerance: the share of the mean square, published 1e-3. window: tokens of a chunk behind the first frame.

    own_engine: run as it was published, else on our cache and in the precision of the model.
    """

    tolerance: float = 1e-3
    window: int = 128
    own_engine: bool = True

    @property
    def sampler(self) -> str:
        return "published" if self.own_engine else "published, our engine"

    def accuracy(self, precision: torch.dtype) -> float:
        """The tolerance, in whatever precision."""
        return self.tolerance

    def tokens(self, device: torch.device) -> int:
        """The largest chunk, on any device."""
        return self.window

    @torch.no_grad()
    def sample(self, model: StarFlow, noise_BFChw: Tensor, text_BLE: Tensor | None, guidance: float) -> tuple[Tensor, dict[str, Report]]:
        """Latents (B, F, C, h, w) and a report per block kind; arguments as of `reelflow.sampling.sample`, in one window.

        Raises:
            ValueError: its own engine on a model that is not in float32.
        """
        kinds = {parameter.dtype for parameter in model.parameters()}
        if self.own_engine and kinds != {torch.float32}:
            raise ValueError(f"the published sampler runs in float32, this model in {', '.join(map(str, kinds))}; load it in float32")
        clips, frames, _, height, width = noise_BFChw.shape
        size, stride, deep = (height, width), height * width, model.deep_block
        engine = Rereading if self.own_engine else Conditioner
        conditioner = engine(model, deep, clips, size, frames * stride, guidance)
        conditioner.read_text(text_BLE)
        u, found = self.invert(deep, conditioner, order(to_tokens(noise_BFChw), deep).flatten(1, 2), stride)
        reports = {"deep": found, "shallow": Report()}
        x = order(u.unflatten(1, (frames, stride)), deep).flatten(0, 1)
        for block in reversed(model.blocks[:-1]):
            u, found = self.invert(block, engine(model, block, len(x), size, stride), order(x[:, None], block)[:, 0], stride)
            x, reports["shallow"] = order(u[:, None], block)[:, 0], reports["shallow"] + found
        return from_tokens(x.unflatten(0, (clips, frames)), *size), reports

    def invert(
        self, block: FlowBlock, read: Callable[[Tensor, Tensor, int], Affine], z_BNC: Tensor, stride: int
    ) -> tuple[Tensor, Report]:
        """Tokens (B, N, C) in block order. `stride`: places of a frame."""
        assert block.sos is not None, "Jacobi iteration as published needs a start token"
        stream = torch.cat((block.sos.expand(len(z_BNC), 1, -1), z_BNC), 1)
        passes = evaluations = start = 0
        while start < z_BNC.shape[1]:
            stop = min(start + (SMALL if start <= stride else self.window), z_BNC.shape[1])
            place, tokens = torch.arange(start, stop, device=z_BNC.device)[None], stream[:, 1 + start : 1 + stop]
            back = stride if start > stride else 0
            inputs = stream[:, start - back : stop - back]
            for _ in range(MOST):
                new = read(inputs, place, stop).inverse(z_BNC[:, start:stop])
                change = (new - tokens).square().mean() / new.square().mean()
                tokens.copy_(new)
                inputs = stream[:, start:stop]
                passes, evaluations = passes + 1, evaluations + stop - start
                if change < self.tolerance:
                    break
            start = stop
        return stream[:, 1:], Report(passes, evaluations)


class Rereading:
    """The parameter function as published; called as a `Conditioner` is, with the places of one chunk, all clips alike."""

    def __init__(self, model: StarFlow, block: FlowBlock, batch: int, size: tuple[int, int], places: int, guidance: float = 0.0):
        self.block, self.guidance = block, guidance
        self.text = model.config.text_tokens if block.proj_text is not None else 0
        self.rows = 2 * batch if guidance else batch
        self.keys, self.values = ([self._room(cast(Layer, layer), places) for layer in block.layers] for _ in range(2))
        every = torch.arange(-self.text, places, device=block.proj_in.weight.device)
        self.rotary = model.rotary(every, size, bool(self.text))

    def _room(self, layer: Layer, places: int) -> Tensor:
        found = layer.attention
        return found.qkv.weight.new_zeros(self.rows, found.kv_heads, self.text + places, found.head_dim)

    def read_text(self, text_BLE: Tensor | None) -> None:
        if self.block.proj_text is not None and text_BLE is not None:
            self._run(self.block.proj_text(text_BLE), 0)

    def __call__(self, inputs_BnC: Tensor, place_1n: Tensor, used: int) -> Affine:
        hidden = self.block.embed(inputs_BnC, place_1n)
        if not self.guidance:
            return self.block.read(self._run(hidden, used))
        both = self.block.read(self._run(torch.cat((hidden, hidden)), used))
        conditional, unconditional = (Affine(*pair) for pair in zip(*(part.chunk(2) for part in both), strict=True))
        return guide(conditional, unconditional, self.guidance)

    def _run(self, hidden_BnM: Tensor, used: int) -> Tensor:
        """The last `n` of the places before `used`, which see all before them."""
        stop, count = self.text + used, hidden_BnM.shape[1]

        def attend(keys_BHKD: Tensor, values_BHKD: Tensor, q_BHnD: Tensor, k_BHnD: Tensor, v_BHnD: Tensor) -> Tensor:
            keys_BHKD[:, :, stop - count : stop], values_BHKD[:, :, stop - count : stop] = k_BHnD, v_BHnD
            keys = keys_BHKD[:, :, :stop]
            if self.rotary is not None:
                turn, halves = self.rotary
                q_BHnD, keys = Rotary(turn[stop - count : stop], halves).rotate(q_BHnD), Rotary(turn[:stop], halves).rotate(keys)
            mask = torch.ones(count, stop, dtype=torch.bool, device=keys.device).tril(stop - count)
            return attention(q_BHnD, keys, values_BHKD[:, :, :stop], mask)

        layers: list[Attend] = [partial(attend, *stores) for stores in zip(self.keys, self.values, strict=True)]
        return self.block.run(hidden_BnM, None, layers)
