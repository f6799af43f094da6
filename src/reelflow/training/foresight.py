"""What a flow expects of a latent frame from the frames before it alone, and how far off that is: how it learns motion.

In the likelihood a token is told of all places of its own frame that come before it. The first of them to show a thing give away
where it is, so that not having foreseen it costs a few bits of a frame, from targets that carry data noise. Here the deep block does
without: its inputs within the frame are the start token, its target has no noise, and every place of the thing pays.

Shapes: B batch, F latent frames, S places of a frame, T = F · S tokens, L text tokens, E text channels, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelflow.flow import Affine, StarFlow, order
from reelflow.flow.attention import Attend
from reelflow.flow.block import FlowBlock
from reelflow.training.attention import attention, causal
from reelflow.training.loss import mean_of_frames


class ForeseeingFlow(StarFlow):
    """A flow that also says what it expects of its frames; the same weights. Needs a start token."""

    def foreseen(
        self, x_BFChw: Tensor, clean_BFChw: Tensor, text_BLE: Tensor | None, learned_BF: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`loss.nll` of clips, (B,), and the squared error of what is expected, (B,).

        The error of shifts without their own frame, to the tokens that the same latents without noise have, in the scales of the
        likelihood: ½ |u − shift|² / scale² averaged over the values of all frames from the second on, in nats per value.
        learned_BF: which latent frames count, as in `loss.nll`.
        """
        size = (x_BFChw.shape[-2], x_BFChw.shape[-1])
        u_BFSC, shallow = (order(found, self.deep_block) for found in self.to_deep(x_BFChw))
        with torch.no_grad():
            wanted_BFSC = order(self.to_deep(clean_BFChw)[0], self.deep_block)
        known, expected_BTC = self.both_parameters(u_BFSC, size, text_BLE)
        z, deep = known.forward(u_BFSC.flatten(1, 2))
        off = (wanted_BFSC[:, 1:].flatten(1, 2) - expected_BTC) / known.scale.detach()[:, u_BFSC.shape[2] :]
        nll = (0.5 * z.square() - deep - shallow.flatten(1, 2)).unflatten(1, u_BFSC.shape[1:3])
        error = 0.5 * off.square().unflatten(1, (-1, u_BFSC.shape[2]))
        return mean_of_frames(nll, learned_BF), mean_of_frames(error, None if learned_BF is None else learned_BF[:, 1:])

    def both_parameters(self, u_BFSC: Tensor, size: tuple[int, int], text_BLE: Tensor | None) -> tuple[Affine, Tensor]:
        """The deep block's for all tokens (B, T, C), and shifts of those from the second frame on without their own frame (B, T − S, C).

        One pass over [text ‖ tokens ‖ tokens without their own frame], all in block order: what was before is read once for both.
        """
        deep, (_, frames, places, _) = self.deep_block, u_BFSC.shape
        u_BTC, place = u_BFSC.flatten(1, 2), self.places(frames, size, deep.proj_text is not None, u_BFSC.device)
        text = len(place) - frames * places
        place = torch.cat((place, place[text + places :]))
        hidden = deep.embed(torch.cat((deep.start(u_BTC), without_own_frame(deep, u_BFSC)), 1), place[text:])
        if deep.proj_text is not None and text_BLE is not None:
            hidden = torch.cat((deep.proj_text(text_BLE), hidden), 1)
        hidden = deep.run(hidden, self.rotary(place, size, bool(text)), [frames_before(text, frames, places)] * len(deep.layers))
        shift, scale = deep.read(hidden[:, text:])
        tokens = frames * places
        return Affine(shift[:, :tokens], scale[:, :tokens]), shift[:, tokens:]


def without_own_frame(deep: FlowBlock, u_BFSC: Tensor) -> Tensor:
    """Inputs (B, T − S, C) of the frames from the second on: the token before each frame, else the start token."""
    assert deep.sos is not None, "without a start token there is nothing to put in a token's place"
    before = u_BFSC[:, :-1, -1:]
    return torch.cat((before, deep.sos.expand(*before.shape[:2], u_BFSC.shape[2] - 1, -1)), 2).flatten(1, 2)


def frames_before(text: int, frames: int, places: int) -> Attend:
    """The view of [text ‖ F frames ‖ F − 1 frames]: causal in the first two; a frame of the third sees itself, text, and the frames
    before it among the second.
    """
    known = text + frames * places

    def run(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        parts = [causal(*(x[:, :, :known] for x in (q_BHTD, k_BHTD, v_BHTD)))]
        for frame in range(1, frames):
            own = slice(known + (frame - 1) * places, known + frame * places)
            keys, values = (torch.cat((x[:, :, : text + frame * places], x[:, :, own]), 2) for x in (k_BHTD, v_BHTD))
            parts.append(attention(q_BHTD[:, :, own], keys, values))
        return torch.cat(parts, 2)

    return run
