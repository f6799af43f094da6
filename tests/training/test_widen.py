"""A wider decoder that decodes the same."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan

from reelflow.training.vae import new_vae
from reelflow.training.widen import widened


def vae(residual: bool) -> AutoencoderKLWan:
    torch.manual_seed(0)
    if residual:
        made = new_vae()
    else:
        made = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


@pytest.mark.parametrize(("residual", "base", "times"), [(True, 32, 2), (True, 48, 3), (False, 8, 2)])
@torch.no_grad()
def test_the_wide_decoder_decodes_the_same(residual: bool, base: int, times: int) -> None:
    narrow = vae(residual)
    wide = widened(narrow, base)
    z = torch.randn(1, narrow.config.z_dim, 3, 2, 4)
    expected, found = narrow.decode(z).sample, wide.decode(z).sample
    assert expected.std() > 0.05
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max().clamp(min=1)
    assert sum(p.numel() for p in wide.decoder.parameters()) > 0.8 * times**2 * sum(p.numel() for p in narrow.decoder.parameters())
    for name, value in narrow.encoder.state_dict().items():
        assert torch.equal(wide.encoder.state_dict()[name], value)
    weight = wide.decoder.mid_block.resnets[0].conv1.weight
    assert not torch.equal(*weight[:, : weight.shape[1] // times * 2].chunk(2, 1)), "copies have to part"


def test_a_width_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="a decoder of width 24 is not made of one of 16; give a multiple of that"):
        widened(vae(True), 24)
