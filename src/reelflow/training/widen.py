"""A wider decoder for a trained video VAE that computes the same at first: the encoder, and so all latents, stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor


def widened(vae: Any, base: int, seed: int = 0) -> AutoencoderKLWan:
    """A copy of `vae` (Wan 2.1 or 2.2) whose decoder is several times as wide.

    Every unit becomes several alike, and what reads them is divided among the copies unevenly, so that they part when they
    are trained (Net2Wider, Chen et al. 2016).

    Args:
        base: the new `decoder_base_dim`, a multiple of the present one.

    Raises:
        ValueError: it is not.
    """
    old = vae.config.decoder_base_dim or vae.config.base_dim
    times, rest = divmod(base, old)
    if rest or times < 1:
        raise ValueError(f"a decoder of width {base} is not made of one of {old}; give a multiple of that")
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    wide = AutoencoderKLWan(**config | {"decoder_base_dim": base})
    generator, state = torch.Generator().manual_seed(seed), vae.state_dict()
    wide.load_state_dict({name: _grown(name, state[name], like.shape, times, generator) for name, like in wide.state_dict().items()})
    return wide.eval()


def _grown(name: str, x: Tensor, shape: torch.Size, times: int, generator: torch.Generator) -> Tensor:
    """A parameter in its new shape; of queries, keys and values, and of two frames at once, each is repeated by itself."""
    if x.shape == shape:
        return x
    parts = 3 if "to_qkv" in name else 2 if "time_conv" in name else 1
    if x.shape[0] != shape[0]:
        x = torch.cat([some.repeat(times, *[1] * (x.dim() - 1)) for some in x.chunk(parts)])
    if x.dim() > 1 and x.shape[1] != shape[1]:
        shares = 0.5 + torch.rand((times, *x.shape[:2], *[1] * (x.dim() - 2)), generator=generator)
        x = (x * (shares / shares.sum(0))).transpose(0, 1).flatten(1, 2)
    if "to_qkv" in name:
        query, rest = x[: len(x) // 3], x[len(x) // 3 :]
        x = torch.cat((query * times**-0.5, rest))  # products of queries and keys have as many more terms
    return x
