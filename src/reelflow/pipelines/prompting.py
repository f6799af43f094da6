"""Prompts to text states: what the denoiser reads, and what the deep block reads from which latent frame on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from reelflow.adapters.text import TextEncoder, wrap_prompt
from reelflow.config import FlowConfig, ModelConfig
from reelflow.pipelines.base import say

Parts = list[tuple[int, Tensor | None]]
"""(first latent frame, text states from it on)."""


@dataclass(frozen=True)
class Prompting:
    """The text side of a model; `encoder` is None for a model without text."""

    about: ModelConfig
    config: FlowConfig
    encoder: TextEncoder | None
    device: torch.device
    use: Callable[..., AbstractContextManager[None]] = lambda *parts: nullcontext()
    """Has parts of the model on the device; here "text"."""

    def guidance(self, asked: float | None) -> float:
        """The guidance to use: as asked, else the model's own; 0 without text."""
        if self.encoder is None:
            return 0.0
        return self.about.guidance if asked is None else asked

    def states(self, prompts: list[str], aspect: str, image: bool) -> Tensor | None:
        """States (B, L, E) of wrapped prompts. A prompt longer than the encoder takes is cut, and said so."""
        if self.encoder is None:
            return None
        wrap = self.about.prompt
        wrapped = [
            wrap_prompt(
                prompt, fps=self.about.fps if wrap.fps else None, image=image, noise_std=self.config.noise_std if wrap.noise else None,
                aspect=aspect if wrap.aspect else None,
            )
            for prompt in prompts
        ]  # fmt: skip
        with self.use("text"):
            found = self.encoder.encode(wrapped)
        for cut in filter(None, found.cut):
            say(f"the prompt is longer than the {self.encoder.tokens} tokens the text encoder takes; not read: {cut.strip()!r}")
        return found.states.to(self.device)

    def parts(
        self, said: list[tuple[int, list[str]]], guidance: float, aspect: str, frames: int, window: int | None = None
    ) -> tuple[Parts, Parts]:
        """States of (first latent frame, prompts of all clips): as they are, and as the deep block reads them.

        The latter are followed by the unconditional ones under guidance. They are marked as a continuation, where the model
        was trained to tell (`later_windows`), when they begin later or go on beyond the `window`, the trained one by default.
        """
        image, window, tells = frames == 1, window or self.config.window, self.about.later_windows == "extend"
        marked = [(first, prompts, tells and first > 0) for first, prompts in said]
        if tells and frames > window and all(first > window for first, _ in said[1:]):
            marked.insert(1, (window, said[0][1], True))
        both: Parts = []
        for first, prompts, later in marked:
            texts = prompts + [""] * len(prompts) * bool(guidance)
            both.append((first, self.states([f"(extend) {text}" if later else text for text in texts], aspect, image)))
        return [(first, self.states(prompts, aspect, image)) for first, prompts in said], both
