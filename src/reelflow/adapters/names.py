"""Names of the reference's tensors in ours, and every tensor a configuration has.

Source: apple/ml-starflow (`transformer_flow.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from reelflow.config import FlowConfig

_BLOCK_NAMES = (
    (re.compile(r"^sos_embed$"), "sos"),
    (re.compile(r"^pos_embed$"), "pos_embed"),
    (re.compile(r"^(proj_in|proj_out)\.(weight|bias)$"), r"\1.\2"),
    (re.compile(r"^proj_txt\.(weight|bias)$"), r"proj_text.\1"),
    (re.compile(r"^final_norm\.weight$"), "final_norm.weight"),
    (re.compile(r"^attn_blocks\.(\d+)\.attention\.(norm|qkv|proj)\.(weight|bias)$"), r"layers.\1.attention.\2.\3"),
    (re.compile(r"^attn_blocks\.(\d+)\.attention\.(query_norm|key_norm|post_norm)\.weight$"), r"layers.\1.attention.\2.weight"),
    (re.compile(r"^attn_blocks\.(\d+)\.mlp\.norm\.(weight|bias)$"), r"layers.\1.mlp.norm.\2"),
    (re.compile(r"^attn_blocks\.(\d+)\.mlp\.main\.0\.(weight|bias)$"), r"layers.\1.mlp.up.\2"),
    (re.compile(r"^attn_blocks\.(\d+)\.mlp\.main\.2\.(weight|bias)$"), r"layers.\1.mlp.down.\2"),
    (re.compile(r"^attn_blocks\.(\d+)\.mlp\.(gate|up|down)_proj\.(weight|bias)$"), r"layers.\1.mlp.\2.\3"),
    (re.compile(r"^attn_blocks\.(\d+)\.mlp\.post_norm\.weight$"), r"layers.\1.mlp.post_norm.weight"),
)
_BUFFER = re.compile(r"^(var|feat_rope(_gen)?\..+|blocks\.\d+\.attn_mask|learnable_self_denoiser\.attn_mask)$")
_PLACE = re.compile(r"^(?:blocks\.(\d+)|learnable_self_denoiser)\.(.+)$")


def rename(key: str, blocks: int) -> str | None:
    """Our name of a reference tensor; None for buffers that hold nothing learned.

    Args:
        key: a key of the reference's state dict.
        blocks: N, number of flow blocks; the last one is the deep block.

    Raises:
        ValueError: a key the reference does not have.

    Example:
        >>> rename("blocks.5.attn_blocks.0.mlp.main.2.bias", blocks=6)
        'deep_block.layers.0.mlp.down.bias'
    """
    if _BUFFER.match(key):
        return None
    place = _PLACE.match(key)
    if place and (place[1] is None or int(place[1]) < blocks):
        index = None if place[1] is None else int(place[1])
        prefix = "denoiser" if index is None else "deep_block" if index == blocks - 1 else f"shallow_blocks.{index}"
        for pattern, name in _BLOCK_NAMES:
            if pattern.match(place[2]):
                return f"{prefix}.{pattern.sub(name, place[2])}"
    raise ValueError(f"{key}: not a tensor of a STARFlow with {blocks} blocks")


def flow_shapes(config: FlowConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a flow, name → shape: what a complete checkpoint of this configuration holds, no more, no less."""
    shapes: dict[str, tuple[int, ...]] = {}
    last = len(config.layers) - 1
    for index, layers in enumerate(config.layers):
        prefix, width = ("deep_block", config.deep_width) if index == last else (f"shallow_blocks.{index}", config.width)
        if config.sos:
            shapes[f"{prefix}.sos"] = (config.channels,)
        if config.learned_places:
            shapes[f"{prefix}.pos_embed"] = (config.learned_places, width)
        shapes.update(_stack(prefix, config, width, layers, 2 * config.channels, config.text_dim if index == last else 0))
    if config.denoiser:
        text = config.text_dim if config.denoiser.text else 0
        shapes.update(_stack("denoiser", config, config.denoiser.width, config.denoiser.layers, config.channels, text))
    return shapes


def _stack(prefix: str, config: FlowConfig, width: int, layers: int, out: int, text: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Projections and transformer layers of one block."""

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{prefix}.{name}.weight", (rows, columns)
        if bias:
            yield f"{prefix}.{name}.bias", (rows,)

    def scale(name: str, bias: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{prefix}.{name}.weight", (config.head_dim if name.endswith(("query_norm", "key_norm")) else width,)
        if bias:
            yield f"{prefix}.{name}.bias", (width,)

    yield from linear("proj_in", width, config.channels)
    yield from linear("proj_out", out, width)
    if text:
        yield from linear("proj_text", width, text)
    yield from scale("final_norm")
    heads = config.num_heads or width // config.head_dim
    queries, keys = heads * config.head_dim, (config.num_kv_heads or heads) * config.head_dim
    for layer in range(layers):
        attention, mlp = f"layers.{layer}.attention", f"layers.{layer}.mlp"
        for part in (attention, mlp):
            yield from scale(f"{part}.norm", bias=config.norm == "layer")
            if config.post_norm:
                yield from scale(f"{part}.post_norm")
        if config.qk_norm:
            yield from scale(f"{attention}.query_norm")
            yield from scale(f"{attention}.key_norm")
        yield from linear(f"{attention}.qkv", queries + 2 * keys, width, config.bias)
        yield from linear(f"{attention}.proj", width, queries, config.bias)
        for part in ("up", "gate") if config.mlp == "swiglu" else ("up",):
            yield from linear(f"{mlp}.{part}", 4 * width, width, config.bias)
        yield from linear(f"{mlp}.down", width, 4 * width, config.bias)
