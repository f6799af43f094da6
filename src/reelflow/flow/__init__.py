"""The model: an exactly invertible map between latents and noise (torch only)."""

from reelflow.flow.affine import Affine, guide
from reelflow.flow.cache import KVCache
from reelflow.flow.model import FlowOutput, StarFlow, from_tokens, order, to_tokens

__all__ = ["Affine", "FlowOutput", "KVCache", "StarFlow", "from_tokens", "guide", "order", "to_tokens"]
