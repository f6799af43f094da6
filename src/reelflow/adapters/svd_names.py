"""The original single files of Stable Video Diffusion in diffusers' names: UNet, VAE, CLIP.

The files follow Stability-AI/generative-models (`VideoUNet`, `AutoencodingEngine`) and open_clip (`VisionTransformer`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor

LAYERS = 2
"""ResBlocks per level of the UNet, one more on the way up; all released models have two."""

UNET, DECODER = "model.diffusion_model.", "first_stage_model.decoder."
VAE_ENCODER = "conditioner.embedders.3.encoder."
CLIP = "conditioner.embedders.0.open_clip.model.visual."
UNUSED = re.compile(
    r"conditioner\.embedders\.0\.open_clip\.model\.(?!visual\.)"  # the text tower
    r"|conditioner\.embedders\.3\.encoder\.(decoder|post_quant_conv)\."
    r"|first_stage_model\.(encoder|quant_conv)\."  # the encoder once more
)
"""Held by the files and not needed to make videos."""

Rules = tuple[tuple[str, str], ...]
_RES_BLOCK: Rules = (
    ("in_layers.0.", "norm1."), ("in_layers.2.", "conv1."), ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."), ("out_layers.3.", "conv2."), ("skip_connection.", "conv_shortcut."),
)  # fmt: skip
_TIME: Rules = (
    ("time_embed.0.", "time_embedding.linear_1."), ("time_embed.2.", "time_embedding.linear_2."),
    ("label_emb.0.0.", "add_embedding.linear_1."), ("label_emb.0.2.", "add_embedding.linear_2."),
    ("input_blocks.0.0.", "conv_in."), ("out.0.", "conv_norm_out."), ("out.2.", "conv_out."),
)  # fmt: skip
_CLIP: Rules = (
    ("class_embedding", "embeddings.class_embedding"), ("positional_embedding", "embeddings.position_embedding.weight"),
    ("conv1.", "embeddings.patch_embedding."), ("ln_pre.", "pre_layrnorm."), ("ln_post.", "post_layernorm."),
)  # fmt: skip
_CLIP_LAYER: Rules = (
    ("ln_1.", "layer_norm1."), ("ln_2.", "layer_norm2."), ("mlp.c_fc.", "mlp.fc1."), ("mlp.c_proj.", "mlp.fc2."),
    ("attn.out_proj.", "self_attn.out_proj."),
)  # fmt: skip
_VAE_ATTENTION: Rules = (("norm.", "group_norm."), ("q.", "to_q."), ("k.", "to_k."), ("v.", "to_v."), ("proj_out.", "to_out.0."))
Converted = Iterator[tuple[str, Callable[[Tensor], Tensor] | None]]
"""diffusers' names of a tensor, each with what is done to it."""


def _renamed(key: str, rules: Rules) -> str:
    for start, name in rules:
        if key.startswith(start):
            return name + key.removeprefix(start)
    raise KeyError(key)


def _res_block(key: str) -> str:
    """A key inside a VideoResBlock."""
    if key == "time_mixer.mix_factor":
        return key
    part, inner = ("temporal_res_block.", key.removeprefix("time_stack.")) if key.startswith("time_stack.") else ("spatial_res_block.", key)
    return part + _renamed(inner, _RES_BLOCK)


def _transformer(key: str) -> str:
    """A key inside a SpatialVideoTransformer; the rest has the same name."""
    for start, name in (("time_stack.", "temporal_transformer_blocks."), ("time_pos_embed.0.", "time_pos_embed.linear_1."),
                        ("time_pos_embed.2.", "time_pos_embed.linear_2.")):  # fmt: skip
        if key.startswith(start):
            return name + key.removeprefix(start)
    return key


def unet_name(key: str) -> str:
    """diffusers' name of a tensor of the UNet.

    Raises:
        KeyError: it has none.

    Example:
        >>> unet_name("output_blocks.4.1.time_stack.0.ff_in.net.2.bias")
        'up_blocks.1.attentions.1.temporal_transformer_blocks.0.ff_in.net.2.bias'
    """
    for start, _ in _TIME:
        if key.startswith(start):
            return _renamed(key, _TIME)
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", key):
        place, inner = int(found[1]), found[2]
        return f"mid_block.attentions.0.{_transformer(inner)}" if place == 1 else f"mid_block.resnets.{place // 2}.{_res_block(inner)}"
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", key)
    if not found:
        raise KeyError(key)
    down, index, place, inner = found[1] == "input", int(found[2]), int(found[3]), found[4]
    block, layer = divmod(index - 1 if down else index, LAYERS + 1)
    prefix = f"{'down' if down else 'up'}_blocks.{block}"
    sampler = "op." if down else "conv."
    if inner.startswith(sampler):
        return f"{prefix}.{'down' if down else 'up'}samplers.0.conv.{inner.removeprefix(sampler)}"
    return f"{prefix}.attentions.{layer}.{_transformer(inner)}" if place else f"{prefix}.resnets.{layer}.{_res_block(inner)}"


def _vae_block(key: str) -> str:
    """A key inside a ResnetBlock or VideoResBlock of a VAE, under the part it belongs to in diffusers' temporal decoder."""
    if key.startswith("time_stack."):
        return "temporal_res_block." + _renamed(key.removeprefix("time_stack."), _RES_BLOCK)
    return "time_mixer.mix_factor" if key == "mix_factor" else key.replace("nin_shortcut", "conv_shortcut")


def vae_name(key: str, temporal: bool) -> str:
    """diffusers' name of a tensor inside an encoder (temporal: False) or a decoder, without `encoder.` or `decoder.`.

    Raises:
        KeyError: it has none.
    """
    if found := re.fullmatch(r"mid\.block_([12])\.(.+)", key):
        return f"mid_block.resnets.{int(found[1]) - 1}.{_spatial(_vae_block(found[2]), temporal)}"
    if found := re.fullmatch(r"mid\.attn_1\.(.+)", key):
        return "mid_block.attentions.0." + _renamed(found[1], _VAE_ATTENTION)
    if found := re.fullmatch(r"(down|up)\.(\d)\.block\.(\d)\.(.+)", key):
        level = int(found[2]) if found[1] == "down" else 3 - int(found[2])
        return f"{found[1]}_blocks.{level}.resnets.{found[3]}.{_spatial(_vae_block(found[4]), temporal)}"
    if found := re.fullmatch(r"(down|up)\.(\d)\.(?:down|up)sample\.conv\.(.+)", key):
        level = int(found[2]) if found[1] == "down" else 3 - int(found[2])
        return f"{found[1]}_blocks.{level}.{found[1]}samplers.0.conv.{found[3]}"
    rules = (("conv_in.", "conv_in."), ("norm_out.", "conv_norm_out."), ("conv_out.time_mix_conv.", "time_conv_out."), ("conv_out.",) * 2)
    return _renamed(key, rules)


def _spatial(name: str, temporal: bool) -> str:
    own = not temporal or name.startswith(("temporal_res_block.", "time_mixer."))
    return name if own else f"spatial_res_block.{name}"


def _clip(key: str) -> Converted:
    if key == "proj":
        yield "visual_projection.weight", lambda tensor: tensor.t().contiguous()
    elif found := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", key):
        prefix = f"vision_model.encoder.layers.{found[1]}."
        if part := re.fullmatch(r"attn\.in_proj_(weight|bias)", found[2]):
            for index, name in enumerate("qkv"):
                yield f"{prefix}self_attn.{name}_proj.{part[1]}", partial(_third, index)
        else:
            yield prefix + _renamed(found[2], _CLIP_LAYER), None
    else:
        yield "vision_model." + _renamed(key, _CLIP), None


def _third(index: int, tensor: Tensor) -> Tensor:
    return tensor.chunk(3)[index]


def _vae(key: str, temporal: bool) -> Converted:
    """Of an encoder or a decoder with its prefix, or of the 1 × 1 convolutions around the latents."""
    part, _, inner = key.partition(".")
    if part in ("quant_conv", "post_quant_conv"):
        yield key, None
        return
    name = f"{part}.{vae_name(inner, temporal and part == 'decoder')}"
    yield name, (lambda tensor: tensor.flatten(1)) if re.search(r"attentions\.0\.to_\w+(\.0)?\.weight", name) else None


def places(key: str, temporal: bool) -> tuple[str, Converted]:
    """Part of the pipeline, and names there, of a key of an original file, `temporal`: whose decoder is the temporal one.

    Raises:
        KeyError: it has none.
    """
    if key.startswith(UNET):
        return "unet", iter([(unet_name(key.removeprefix(UNET)), None)])
    if key.startswith(CLIP):
        return "image_encoder", _clip(key.removeprefix(CLIP))
    for prefix in (VAE_ENCODER, "first_stage_model."):
        if key.startswith(prefix):
            return "vae", _vae(key.removeprefix(prefix), temporal)
    raise KeyError(key)


def convert(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """An original state dict as those of diffusers' `unet`, `vae` and CLIP's `image_encoder`, and the keys without a place.

    Tensors stay as they are, mapped where they were mapped; a few are views of them.
    """
    temporal = f"{DECODER}conv_out.time_mix_conv.weight" in state
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "vae": {}, "image_encoder": {}}
    unknown = []
    for key in state:
        if UNUSED.match(key):
            continue
        try:
            part, names = places(key, temporal)
            for name, change in names:
                parts[part][name] = change(state[key]) if change else state[key]
        except KeyError:
            unknown.append(key)
    return parts, unknown
