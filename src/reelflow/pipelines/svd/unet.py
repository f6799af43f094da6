"""The UNet of Stable Video Diffusion, rearranged: what does not change over the steps is computed once.

Shapes: B clips, R rows (B, or 2B under guidance: unconditional ones first), F frames, h × w latent places, C channels,
T steps, E channels of the picture's embedding.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelflow.pipelines.svd.attention import Transformer
from reelflow.pipelines.svd.blocks import Activation, Columns, Convolution, Given, Residual, Upsample, channels_last


class Conditions(NamedTuple):
    """What the UNet is told, for all steps of one sampling."""

    picture: Tensor
    """(R, C, h, w): the first convolution's share of the picture, its bias included."""
    biases: Tensor
    """(T, …), see `Given`."""
    context: Tensor
    positions: Tensor
    eps: float | None
    guided: bool

    def halves(self) -> tuple[Conditions, Conditions]:
        """The unconditional rows, and those of the picture."""
        pictures, contexts = self.picture.chunk(2), self.context.chunk(2)
        unconditional, given = (self._replace(picture=p, context=c, guided=False) for p, c in zip(pictures, contexts, strict=True))
        return unconditional, given


class Stage(nn.Module):
    """One resolution: residual blocks, each with a transformer where the source has one, and a change of resolution."""

    def __init__(self, block: Any, columns: tuple[Columns, Columns, Columns]):
        super().__init__()
        self.residuals: Any = nn.ModuleList(Residual(resnet, columns[0]) for resnet in block.resnets)
        self.transformers: Any = nn.ModuleList(Transformer(model, *columns[1:]) for model in getattr(block, "attentions", ()))
        down, up = getattr(block, "downsamplers", None), getattr(block, "upsamplers", None)
        self.sampler: Any = Convolution(down[0].conv) if down else Upsample(up[0]) if up else None

    def layer(self, index: int, x_NCHW: Tensor, given: Given) -> Tensor:
        x_NCHW = self.residuals[index](x_NCHW, given)
        return self.transformers[index](x_NCHW, given) if index < len(self.transformers) else x_NCHW

    def descend(self, x_NCHW: Tensor, given: Given) -> list[Tensor]:
        """Its input and what each layer makes of it: what the way up reads again."""
        found = [x_NCHW]
        for index in range(len(self.residuals)):
            found.append(self.layer(index, found[-1], given))
        return found

    def ascend(self, x_NCHW: Tensor, skips: list[Tensor], given: Given) -> Tensor:
        """Every layer reads the last of `skips`, and takes it away."""
        for index in range(len(self.residuals)):
            x_NCHW = self.layer(index, torch.cat((x_NCHW, skips.pop()), 1), given)
        return x_NCHW


class Denoiser(nn.Module):
    """A `UNetSpatioTemporalConditionModel` for sampling: shares its weights, gives its values up to rounding."""

    def __init__(self, unet: Any):
        super().__init__()
        columns = Columns(), Columns(), Columns()
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        self.add_time_proj, self.add_embedding = unet.add_time_proj, unet.add_embedding
        latent, picture = unet.conv_in.weight.detach().split(unet.config.in_channels // 2, 1)
        self.conv_latent, self.conv_picture = channels_last(latent), channels_last(picture)
        self.conv_in_bias = unet.conv_in.bias.requires_grad_(False)
        self.down: Any = nn.ModuleList(Stage(block, columns) for block in unet.down_blocks)
        self.middle = Stage(unet.mid_block, columns)
        self.up: Any = nn.ModuleList(Stage(block, columns) for block in unet.up_blocks)
        self.activation_out, self.conv_out = Activation(unet.conv_norm_out), Convolution(unet.conv_out)
        self.recorded = False
        """Whether a GPU is to record its steps (`sampling.denoise`)."""

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_latent.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_latent.device

    def conditions(
        self, picture_BChw: Tensor, states_BE: Tensor, ids: list[float], timesteps_T: Tensor, frames: int, guided: bool, eps: float | None
    ) -> Conditions:
        """Everything that no step changes.

        Args:
            picture_BChw: latents of the picture, not scaled.
            states_BE: its CLIP embedding.
            ids: fps − 1, motion, noise level.
            timesteps_T: the UNet's time of every step, 0.25 ln σ.
            guided: with unconditional rows, whose picture and embedding are zero.
            eps: see `Given`.
        """
        picture_BChw, states_BE = picture_BChw.to(self.device, self.dtype), states_BE.to(self.device, self.dtype)
        if guided:
            picture_BChw, states_BE = (torch.cat((torch.zeros_like(x), x)) for x in (picture_BChw, states_BE))
        told = self.add_time_proj(torch.tensor(ids, device=self.device)).flatten().to(self.dtype)
        embedding_TE = self.time_embedding(self.time_proj(timesteps_T.to(self.device)).to(self.dtype)) + self.add_embedding(told)
        shown = F.conv2d(picture_BChw.contiguous(memory_format=torch.channels_last), self.conv_picture, self.conv_in_bias, padding=1)
        active = F.silu(embedding_TE)
        residuals = [module for module in self.modules() if isinstance(module, Residual)]
        transformers = [module for module in self.modules() if isinstance(module, Transformer)]
        attentions = [block.attention for kind in ("spatial", "temporal") for model in transformers for block in getattr(model, kind)]
        return Conditions(
            shown,
            _table([placed for block in residuals for placed in zip(block.places, block.biases(active), strict=True)]),
            _table([(attention.place, attention.context(states_BE)) for attention in attentions]),
            _table([(model.place, model.positions(frames)) for model in transformers]),
            eps,
            guided,
        )

    def forward(
        self, scaled_BF4hw: Tensor, conditions: Conditions, step_1: Tensor, inner: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """v (R, F, 4, h, w) of latents times c_in, in the noise of a step, 0 …, given as (1,) on the device; and what all but the outermost
        level made of them, which a later call may be given as `inner` to leave that work out.
        """
        clips, frames = scaled_BF4hw.shape[:2]
        given = Given(frames, conditions.biases.index_select(0, step_1)[0], conditions.context, conditions.positions, conditions.eps)
        latent = scaled_BF4hw.to(self.dtype).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = F.conv2d(latent, self.conv_latent, padding=1).unflatten(0, (clips, frames))
        rows = len(conditions.picture)
        x = (x.repeat(rows // clips, 1, 1, 1, 1) + conditions.picture[:, None]).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        skips = self.down[0].descend(x, given)
        if inner is None:
            inner = self._inner(skips[-1], given)
        x = self.up[-1].ascend(inner, skips, given)
        x = self.conv_out(self.activation_out(x))
        return x.unflatten(0, (rows, frames)), inner

    def _inner(self, x: Tensor, given: Given) -> Tensor:
        """From the outermost level down to the middle and up again."""
        skips = []
        for above, stage in pairwise(self.down):
            skips += stage.descend(above.sampler(x), given)
            x = skips[-1]
        for index in range(len(self.middle.residuals)):
            x = self.middle.layer(index, x, given)
        for stage in self.up[:-1]:
            x = stage.sampler(stage.ascend(x, skips, given))
        return x


def _table(placed: list[tuple[slice, Tensor]]) -> Tensor:
    return torch.cat([columns for _, columns in sorted(placed, key=lambda each: each[0].start)], -1)


__all__ = ["Conditions", "Denoiser"]
