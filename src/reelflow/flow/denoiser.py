"""The network of flow-score matching (STARFlow-V): an estimate of σ²/0.3 · ∇_x(−log p) for every latent value.

Shapes: B batch, F latent frames, S places of a frame, L text tokens, C channels, M width, E text channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reelflow.config import FlowConfig
from reelflow.flow.attention import Layer, Projection, RMSNorm, frame_window
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

    def forward(self, x_BFSC: Tensor, rotary: Rotary | None, text_BLE: Tensor | None) -> Tensor:
        """Scores of the shape of `x_BFSC`, float32; `rotary` covers `[text ‖ tokens]`."""
        _, frames, places, _ = x_BFSC.shape
        hidden = self.proj_in(x_BFSC.flatten(1, 2))
        text = 0
        if self.proj_text is not None:
            assert text_BLE is not None
            text = text_BLE.shape[1]
            hidden = torch.cat((self.proj_text(text_BLE), hidden), 1)
        for index, layer in enumerate(self.layers):
            ahead = self.config.look_ahead if index == 0 or self.config.look_ahead_layers == "all" else 1
            hidden = layer(hidden, rotary, frame_window(text, frames, places, ahead, self.config.window))
        return self.proj_out(self.final_norm(hidden[:, text:])).unflatten(1, (frames, places))
