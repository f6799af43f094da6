"""The sampler that STARFlow-V was published with, written from its description, to measure ours against.

Fixed chunks: 32 tokens in the first frame and in shallow blocks, 128 behind it, though at most a frame. A chunk starts from
the noise, or from the tokens one frame back, and is evaluated as a whole until the mean square of its change falls below a
share of its own mean square, 32 times at most. Network, cache and precision are those of `reelflow.sampling`, so that the
algorithms alone are compared.

Shapes: B clips, N places, C latent channels, h × w places of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reelflow.flow import StarFlow, from_tokens, order, to_tokens
from reelflow.flow.block import FlowBlock
from reelflow.sampling import Report
from reelflow.sampling.conditioner import Conditioner

MOST = 32


@dataclass(frozen=True)
class FixedChunks:
    """tolerance: the share of the mean square, published 1e-3. window: tokens of a chunk behind the first frame."""

    sampler: str = "fixed chunks"
    tolerance: float = 1e-3
    window: int = 128

    @torch.no_grad()
    def sample(self, model: StarFlow, noise_BFChw: Tensor, text_BLE: Tensor | None, guidance: float) -> tuple[Tensor, dict[str, Report]]:
        """Latents (B, F, C, h, w) and a report per block kind; arguments as of `reelflow.sampling.sample`, in one window."""
        clips, frames, _, height, width = noise_BFChw.shape
        size, stride, deep = (height, width), height * width, model.deep_block
        conditioner = Conditioner(model, deep, clips, size, frames * stride, guidance)
        conditioner.read_text(text_BLE)
        z = order(to_tokens(noise_BFChw), deep).flatten(1, 2)
        u, reports = self.invert(deep, conditioner, z, stride), {"deep": Report(), "shallow": Report()}
        reports["deep"] = u[1]
        x = order(u[0].unflatten(1, (frames, stride)), deep).flatten(0, 1)
        for block in reversed(model.blocks[:-1]):
            found, report = self.invert(block, Conditioner(model, block, len(x), size, stride), order(x[:, None], block)[:, 0], stride)
            x, reports["shallow"] = order(found[:, None], block)[:, 0], reports["shallow"] + report
        return from_tokens(x.unflatten(0, (clips, frames)), *size), reports

    def invert(self, block: FlowBlock, conditioner: Conditioner, z_BNC: Tensor, stride: int) -> tuple[Tensor, Report]:
        """Tokens (B, N, C) in block order."""
        assert block.sos is not None
        stream = torch.cat((block.sos.expand(len(z_BNC), 1, -1), z_BNC), 1)
        report, places, start = Report(), z_BNC.shape[1], 0
        while start < places:
            stop = min(start + min(32 if start < stride else self.window, stride), places)
            chunk = stream[:, 1 + start : 1 + stop]
            if start >= stride:
                chunk.copy_(stream[:, 1 + start - stride : 1 + stop - stride])
            place = torch.arange(start, stop, device=z_BNC.device)[None]
            for _ in range(MOST):
                new = conditioner(stream[:, start:stop], place, stop).inverse(z_BNC[:, start:stop])
                change = (new - chunk).square().mean() / new.square().mean()
                chunk.copy_(new)
                report += Report(1, stop - start)
                if change < self.tolerance:
                    break
            start = stop
        return stream[:, 1:], report
