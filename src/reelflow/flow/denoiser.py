"""The network of flow-score matching (STARFlow-V): an estimate of σ²/0.3 · ∇_x(−log p) for every latent value.

Shapes: B batch, F latent frames, S places of a frame, L text tokens, C channels, M width, E text channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from reelflow.config import FlowConfig
from reelflow.flow.attention import Layer, Projection, RMSNorm, attention, frame_window
from reelflow.flow.rope import Rotary


class Denoiser(nn.Module):
    """Not shifted and not causal inside a frame; over frames a window with look-ahead (`DenoiserConfig`)."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        assert config.denoiser is not None
        self.config = config.denoiser
        width = self.config.width
        self.proj_in = Projection(config.channels, width)
        self.proj_out = Projection(width, config.channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.proj_text = Projection(config.text_dim, width) if config.text_dim and self.config.text else None
        self.layers = nn.ModuleList(Layer(config, width) for _ in range(self.config.layers))
        self.final_norm = RMSNorm(width)

    @property
    def ahead(self) -> list[int]:
        """`A` of every layer."""
        return [
            self.config.look_ahead if index == 0 or self.config.look_ahead_layers == "all" else 1 for index in range(self.config.layers)
        ]

    def forward(self, x_BFSC: Tensor, rotary: Rotary | None, text_BLE: Tensor | None) -> Tensor:
        """Scores of the shape of `x_BFSC`, float32; `rotary` covers `[text ‖ tokens]`."""
        _, frames, places, _ = x_BFSC.shape
        hidden = self.proj_in(x_BFSC.flatten(1, 2))
        text = 0
        if self.proj_text is not None:
            assert text_BLE is not None
            text = text_BLE.shape[1]
            hidden = torch.cat((self.proj_text(text_BLE), hidden), 1)
        for layer, ahead in zip(self.layers, self.ahead, strict=True):
            hidden = layer(hidden, rotary, frame_window(text, frames, places, ahead, self.config.window))
        return self.proj_out(self.final_norm(hidden[:, text:])).unflatten(1, (frames, places))

    def stream(self, frames: Iterable[Tensor], rotary: Callable[[int], Rotary | None], text_BLE: Tensor | None) -> Iterator[Tensor]:
        """`forward` frame by frame, (B, S, C) each: every layer hands a frame on once it has seen as far ahead as it looks.

        A wavefront: nothing is computed twice, and a frame comes out Σ (A − 1) frames after it went in, or at the end.
        `rotary`: of frame 0, 1, …, and of the text for −1.
        """

        def embedded() -> Iterator[tuple[int, Tensor]]:
            if self.proj_text is not None:
                assert text_BLE is not None
                yield -1, self.proj_text(text_BLE)
            yield from ((index, self.proj_in(x_BSC)) for index, x_BSC in enumerate(frames))

        hidden = embedded()
        for layer, ahead in zip(self.layers, self.ahead, strict=True):
            hidden = stream_layer(cast(Layer, layer), hidden, rotary, ahead, self.config.window)
        yield from (self.proj_out(self.final_norm(found)) for index, found in hidden if index >= 0)


def stream_layer(
    layer: Layer, frames: Iterator[tuple[int, Tensor]], rotary: Callable[[int], Rotary | None], ahead: int, window: int | None
) -> Iterator[tuple[int, Tensor]]:
    """One layer of the wavefront: (frame, hidden states) in, the same out as soon as can be; the text is frame −1."""
    waiting: deque[tuple[int, Tensor, Tensor]] = deque()
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def answer() -> tuple[int, Tensor]:
        frame, hidden, query = waiting.popleft()
        last = max(frame, 0) + ahead - 1
        first = 0 if window is None else max(0, last - window)
        for old in [old for old in seen if 0 <= old < first]:
            del seen[old]
        keys, values = zip(*(found for index, found in seen.items() if index <= last), strict=True)
        return frame, layer.finish(hidden, attention(query, torch.cat(keys, 2), torch.cat(values, 2)))

    for frame, hidden in frames:
        query, key, value = layer.attention.project(hidden, rotary(frame))
        waiting.append((frame, hidden, query))
        seen[frame] = key, value
        while waiting and frame >= max(waiting[0][0], 0) + ahead - 1:
            yield answer()
    while waiting:
        yield answer()
