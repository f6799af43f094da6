"""A deep block that sees few frames back: what it reads all at once is what a ring of as many frames reads as it samples.

Shapes: B clips, F latent frames, C channels, h × w places.
"""

from __future__ import annotations

import pytest
import torch
from choices_measures import Variant, Windowed, narrow

from reelflow.config import FlowConfig
from reelflow.flow import StarFlow
from reelflow.sampling import Schedule, sample


@pytest.mark.parametrize("schedule", [Schedule("sequential"), Schedule(tolerance=0.0)], ids=["sequential", "jacobi"])
def test_a_ring_samples_exactly_from_a_flow_that_sees_few_frames_back(schedule: Schedule) -> None:
    """With text, start token, three layers and frames far beyond the window; a flow that sees all is another one."""
    torch.manual_seed(0)
    config = FlowConfig(
        channels=3, width=32, deep_width=32, layers=(1, 3), head_dim=32, window=8, text_tokens=5, text_dim=6, position_span=4
    )
    flow = StarFlow(config).requires_grad_(False)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    noise, text = torch.randn(2, 8, 3, 2, 4), torch.randn(2, 5, 6)
    narrow(flow, Variant(past=2))
    assert isinstance(flow.deep_block, Windowed)
    flow.deep_block.places = 8
    found, _ = sample(flow, noise, text, window=3, ring=True, schedule=schedule)
    torch.testing.assert_close(flow(found, text).z, noise, atol=1e-5, rtol=0)
    flow.deep_block.past = 7
    assert (flow(found, text).z - noise).abs().max() > 1e-2
