"""A flow block: every token's (shift, scale) from the tokens before it.

Shapes: B batch, T tokens, L text tokens, C latent channels, M model width, E text channels.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from reelflow.config import FlowConfig
from reelflow.flow.affine import Affine, parameters
from reelflow.flow.attention import Attend, Layer, Projection, RMSNorm, causal
from reelflow.flow.cache import KVCache
from reelflow.flow.rope import Rotary


class FlowBlock(nn.Module):
    """A causal transformer over `[text ‖ SOS, x_1 … x_{T−1}]` that gives the affine parameters of x_1 … x_T.

    `reverse`: the block sees the tokens of a latent frame in reverse order. Positions belong to the place in the
    sequence, after that reversal.
    """

    def __init__(self, config: FlowConfig, width: int, layers: int, text: bool, reverse: bool):
        super().__init__()
        self.config = config
        self.reverse = reverse
        self.proj_in = Projection(config.channels, width)
        self.proj_out = Projection(width, 2 * config.channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.sos = nn.Parameter(torch.randn(config.channels)) if config.sos else None
        self.proj_text = Projection(config.text_dim, width) if text else None
        self.pos_embed = nn.Parameter(torch.randn(config.learned_places, width) * 1e-2) if config.learned_places else None
        self.layers = nn.ModuleList(Layer(config, width) for _ in range(layers))
        self.final_norm = RMSNorm(width)

    cache: type[KVCache] = KVCache
    """What its keys and values are kept in."""
    recorded = True
    """Whether a pass can be recorded and played again without the host (see `sampling.replay`)."""

    @property
    def precision(self) -> torch.dtype:
        """What its layers' products are computed in."""
        return cast(Layer, self.layers[0]).attention.qkv.weight.dtype

    @property
    def first(self) -> int:
        """The first place with parameters of its own: 0, or 1 where there is no start token (x_0 = z_0 then)."""
        return 0 if self.config.sos else 1

    def new_cache(self, rows: int, length: int) -> KVCache:
        """Room for `length` tokens (text included) of `rows` sequences."""
        attention, device = cast(Layer, self.layers[0]).attention, self.proj_in.weight.device
        return self.cache(len(self.layers), rows, attention.kv_heads, length, attention.head_dim, self.precision, device)

    def start(self, x_BTC: Tensor) -> Tensor:
        """The transformer's inputs `[SOS, x_1 … x_{T−1}]`, or `[x_1 … x_{T−1}]` without a start token."""
        if self.sos is None:
            return x_BTC[:, :-1]
        return torch.cat((self.sos.expand(len(x_BTC), 1, -1), x_BTC[:, :-1]), 1)

    def embed(self, inputs_BTC: Tensor, place_BT: Tensor) -> Tensor:
        """Inputs that stand at those places of the token sequence, as float32 hidden states (B, T, M)."""
        hidden = self.proj_in(inputs_BTC)
        if self.pos_embed is not None:
            embedding = self.pos_embed.flip(0) if self.reverse else self.pos_embed
            hidden = hidden + embedding[place_BT % len(embedding)]
        return hidden

    def run(self, hidden_BTM: Tensor, rotary: Rotary | None, attends: list[Attend]) -> Tensor:
        for layer, attend in zip(self.layers, attends, strict=True):
            hidden_BTM = layer(hidden_BTM, rotary, attend)
        return hidden_BTM

    def read(self, hidden_BTM: Tensor) -> Affine:
        """Affine parameters (B, T, C) from the last layer's hidden states."""
        return parameters(self.proj_out(self.final_norm(hidden_BTM)), self.config)

    def affine(self, x_BTC: Tensor, rotary: Rotary | None, text_BLE: Tensor | None = None) -> Affine:
        """Parameters of all tokens at once (B, T, C); `rotary` covers `[text ‖ inputs]`."""
        inputs = self.start(x_BTC)
        hidden = self.embed(inputs, torch.arange(inputs.shape[1], device=x_BTC.device))
        text = self.proj_text(text_BLE) if self.proj_text is not None else hidden[:, :0]
        both = torch.cat((text, hidden), 1)
        both = self.run(both, rotary, [causal] * len(self.layers))
        shift, scale = self.read(both[:, text.shape[1] :])
        if self.first:
            shift = torch.cat((torch.zeros_like(shift[:, :1]), shift), 1)
            scale = torch.cat((torch.ones_like(scale[:, :1]), scale), 1)
        return Affine(shift, scale)
