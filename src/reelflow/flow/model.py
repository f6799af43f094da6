"""STARFlow: shallow blocks inside each latent frame, one deep block over the whole video, and the map x ↔ z.

Shapes: B batch, F latent frames, C latent channels, h × w places of a frame (S = h · w), L text tokens, E text channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from reelflow.config import FlowConfig
from reelflow.flow.affine import Affine, wide
from reelflow.flow.block import FlowBlock
from reelflow.flow.denoiser import Denoiser
from reelflow.flow.parallel import Ranks, share_layers
from reelflow.flow.rope import Rotary, positions, rotary


class FlowOutput(NamedTuple):
    """Noise `z` and `log_det`, log|∂z/∂x| of every element summed over the blocks; both float32 (B, F, C, h, w)."""

    z: Tensor
    log_det: Tensor


def to_tokens(x_BFChw: Tensor) -> Tensor:
    """(B, F, C, h, w) → (B, F, S, C), places in raster order."""
    return x_BFChw.flatten(3).transpose(2, 3)


def from_tokens(x_BFSC: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `to_tokens`."""
    return x_BFSC.transpose(2, 3).unflatten(3, (height, width))


def order(x_BFSC: Tensor, block: FlowBlock) -> Tensor:
    """Into the block's token order; its own inverse."""
    return x_BFSC.flip(2) if block.reverse else x_BFSC


class StarFlow(nn.Module):
    """The invertible map between latents x and noise z (arXiv 2506.06276, 2511.20462).

    Sampling runs `deep_block` first, then the shallow blocks from last to first; the forward map runs them the other
    way round.
    """

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        last = len(config.layers) - 1
        self.shallow_blocks = nn.ModuleList(
            FlowBlock(config, config.width, layers, text=False, reverse=index % 2 == 0) for index, layers in enumerate(config.layers[:-1])
        )
        self.deep_block = FlowBlock(config, config.deep_width, config.layers[-1], text=config.text_dim > 0, reverse=last % 2 == 0)
        self.denoiser = Denoiser(config) if config.denoiser else None
        self.ranks = Ranks()

    @property
    def blocks(self) -> list[FlowBlock]:
        """All blocks in the order of the forward map; the last is the deep one."""
        return [*(cast(FlowBlock, block) for block in self.shallow_blocks), self.deep_block]

    def rotary(self, place_T: Tensor, size: tuple[int, int], text: bool) -> Rotary | None:
        """Rotations at places (…) of frames of that size, text at −L … −1 (see `rope.positions`); None with learned positions."""
        return self.rotation(positions(place_T, *size, self.config.position_span, self.config.text_tokens if text else 0))

    def rotation(self, positions_T3: Tensor) -> Rotary | None:
        """Rotations at (row, column, third axis), (…, 3); None with learned positions."""
        config = self.config
        if config.positions == "learned":
            return None
        third_axis = config.text_tokens > 0 or config.window > 1
        return rotary(positions_T3, config.head_dim, third_axis, halves=config.positions == "rotary_half")

    def places(self, frames: int, size: tuple[int, int], text: bool, device: torch.device) -> Tensor:
        """Places of `[text ‖ frames]`, or of the frames alone: −L … F · S − 1."""
        return torch.arange(-self.config.text_tokens if text else 0, frames * size[0] * size[1], device=device)

    def affine(self, block: FlowBlock, x_BFSC: Tensor, size: tuple[int, int], text_BLE: Tensor | None) -> Affine:
        """Parameters of one block for every token, in raster order, (B, F, S, C).

        A shallow block sees each frame as a sequence of its own, the deep block text and frames together.
        """
        batch, frames, places, _ = x_BFSC.shape
        deep = block is self.deep_block
        tokens = order(x_BFSC, block).flatten(1, 2) if deep else order(x_BFSC, block).flatten(0, 1)
        place = self.places(frames if deep else 1, size, deep, tokens.device)
        table = self.rotary(place[: len(place) - block.first], size, deep)
        found = block.affine(tokens, table, text_BLE if deep else None)
        return Affine(*(order(part.reshape(batch, frames, places, -1), block) for part in found))

    def forward(self, x_BFChw: Tensor, text_BLE: Tensor | None = None) -> FlowOutput:
        """Data → noise, with the log-determinant from the same call.

        Args:
            x_BFChw: latents (standardised, noise σ added), float32.
            text_BLE: text states, needed by a model with text.

        Raises:
            ValueError: no text states for a model that reads text.
        """
        if self.config.text_tokens and text_BLE is None:
            raise ValueError("this model reads text; give its states, or those of the empty prompt")
        size = (x_BFChw.shape[-2], x_BFChw.shape[-1])
        u, shallow = self.to_deep(x_BFChw)
        z, deep = self.affine(self.deep_block, u, size, text_BLE).forward(u)
        return FlowOutput(from_tokens(z, *size), from_tokens(shallow + deep, *size))

    def to_deep(self, x_BFChw: Tensor) -> tuple[Tensor, Tensor]:
        """Through the shallow blocks only: tokens that the deep block models, and their log-determinant, both (B, F, S, C)."""
        size = (x_BFChw.shape[-2], x_BFChw.shape[-1])
        u = wide(to_tokens(x_BFChw))
        log_det = torch.zeros_like(u)
        for block in self.blocks[:-1]:
            u, change = self.affine(block, u, size, None).forward(u)
            log_det = log_det + change
        return u, log_det

    def score(self, x_BFChw: Tensor, text_BLE: Tensor | None = None) -> Tensor:
        """The denoiser's output on noisy latents, an estimate of σ²/0.3 · ∇_x(−log p); shape of `x_BFChw`."""
        if self.denoiser is None:
            raise ValueError("this model has no learned denoiser; use the Tweedie step")
        frames, size = x_BFChw.shape[1], (x_BFChw.shape[-2], x_BFChw.shape[-1])
        text = self.denoiser.proj_text is not None
        table = self.rotary(self.places(frames, size, text, x_BFChw.device), size, text)
        return from_tokens(self.denoiser(to_tokens(x_BFChw), table, text_BLE), *size)

    def score_frames(self, frames: Iterable[Tensor], size: tuple[int, int], text_BLE: Tensor | None = None) -> Iterator[Tensor]:
        """`score` frame by frame, (B, C, h, w) each, as soon as the look-ahead allows; `size`: (h, w)."""
        assert self.denoiser is not None
        weight, places = self.denoiser.proj_in.weight, size[0] * size[1]
        text = self.config.text_tokens if self.denoiser.proj_text is not None else 0

        def table(frame: int) -> Rotary | None:
            start, stop = (frame * places, (frame + 1) * places) if frame >= 0 else (-text, 0)
            return self.rotary(torch.arange(start, stop, device=weight.device), size, bool(text))

        tokens = (to_tokens(x_BChw[:, None])[:, 0] for x_BChw in frames)
        for found in self.denoiser.stream(tokens, table, text_BLE):
            yield from_tokens(found[:, None], *size)[:, 0]

    def share(self, ranks: Ranks) -> StarFlow:
        """Be one model of several processes from now on, each of which keeps its share of the deep block (see `flow.parallel`)."""
        share_layers(self.deep_block.layers, ranks)
        self.ranks = ranks
        return self

    def set_precision(self, dtype: torch.dtype) -> StarFlow:
        """Run the transformer layers' products in `dtype`; in and out projections, norms, residual and affine stay float32."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and ".layers." in f".{name}":
                module.to(dtype)
        return self
