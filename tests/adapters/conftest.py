"""What the adapter tests share: every key and shape of the reference's state dict, written down from its constructor, independent of
the package's own list; small parts made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import reelflow.adapters


def reference_shapes(arguments: dict[str, Any], buffers: bool = True) -> dict[str, tuple[int, ...]]:
    """Key → shape for constructor arguments as in a golden folder (all needed ones present), options included."""
    a = {"head_dim": 64, "use_bias": True, "txt_dim": 0, "txt_size": 0, **arguments}
    c, width, places = a["in_channels"], a["channels"], a.get("pt_seq_len") or a["img_size"]
    layers = a["layers_per_block"]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, count in enumerate(layers):
        top = i == len(layers) - 1
        w = (a.get("top_block_channels") or width) if top else width
        block = f"blocks.{i}."
        if a.get("sos"):
            shapes[block + "sos_embed"] = (1, 1, c)
        if not a.get("rope"):
            shapes[block + "pos_embed"] = (a["img_size"] ** 2, w)
        if buffers:
            shapes[block + "attn_mask"] = (places**2 + a["txt_size"],) * 2
        shapes |= _transformer(block, a, w, count, out=2 * c, text=a["txt_dim"] if top else 0)
    if a.get("learnable_self_denoiser"):
        text = a["txt_dim"] if a.get("conditional_denoiser") else 0
        shapes |= _transformer("learnable_self_denoiser.", a, width, 8, out=c, text=text)
    if buffers:
        shapes["var"] = (places**2, c)
        if a.get("rope"):
            for name in ("feat_rope.freqs_cos", "feat_rope.freqs_sin"):
                shapes[name] = (places**2 + a["txt_size"], a["head_dim"])
    return shapes


def _transformer(prefix: str, a: dict[str, Any], w: int, layers: int, out: int, text: int) -> dict[str, tuple[int, ...]]:
    heads = a.get("num_heads") or w // a["head_dim"]
    q, kv = heads * a["head_dim"], (a.get("num_kv_heads") or heads) * a["head_dim"]
    rms = a.get("norm_type") == "rms_norm"
    shapes = {"proj_in.weight": (w, a["in_channels"]), "proj_in.bias": (w,), "proj_out.weight": (out, w), "proj_out.bias": (out,)}
    shapes["final_norm.weight"] = (w,)
    if text:
        shapes |= {"proj_txt.weight": (w, text), "proj_txt.bias": (w,)}
    for j in range(layers):
        attention, mlp = f"attn_blocks.{j}.attention.", f"attn_blocks.{j}.mlp."
        linear = {attention + "qkv": (q + 2 * kv, w), attention + "proj": (w, q)}
        if a.get("use_swiglu"):
            linear |= {mlp + "gate_proj": (4 * w, w), mlp + "up_proj": (4 * w, w), mlp + "down_proj": (w, 4 * w)}
        else:
            linear |= {mlp + "main.0": (4 * w, w), mlp + "main.2": (w, 4 * w)}
        for name, shape in linear.items():
            shapes[name + ".weight"] = shape
            if a["use_bias"]:
                shapes[name + ".bias"] = shape[:1]
        for part in (attention, mlp):
            shapes[part + "norm.weight"] = (w,)
            if not rms:
                shapes[part + "norm.bias"] = (w,)
            if a.get("use_post_norm"):
                shapes[part + "post_norm.weight"] = (w,)
        if a.get("use_qk_norm"):
            shapes |= {attention + "query_norm.weight": (a["head_dim"],), attention + "key_norm.weight": (a["head_dim"],)}
    return {prefix + name: shape for name, shape in shapes.items()}


def constructor(published: dict[str, Any], text_dim: int = 2048, **changes: Any) -> dict[str, Any]:
    """Constructor arguments of a published YAML: renamed by hand here, latent side from the VAE's factor."""
    factor = 16 if "Wan2.2" in published["vae"] else 8
    keys = (
        "patch_size channels top_block_channels rope pt_seq_len sos txt_size cond_top_only use_softplus use_final_norm soft_clip seq_order"
    )
    keys += " seq_order learnable_self_denoiser conditional_denoiser temporal_causal shallow_block_local denoiser_window"
    found = {key: published[key] for key in keys.split() if key in published}
    found |= {"in_channels": published["channel_size"], "num_blocks": published["blocks"], "txt_dim": text_dim}
    found |= {"img_size": published["img_size"] // factor, "layers_per_block": [int(n) for n in published["layers_per_block"].split()]}
    return found | changes


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """A float32 state dict of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) * 0.05 for key, shape in shapes.items()}


@pytest.fixture(scope="session")
def reference() -> SimpleNamespace:
    """`published` (YAML arguments by name), and the functions `shapes`, `constructor`, `random_state`."""
    path = Path(reelflow.adapters.__file__).with_name("published.json")
    published = json.loads(path.read_text(encoding="utf-8"))
    return SimpleNamespace(published=published, shapes=reference_shapes, constructor=constructor, random_state=random_state)


