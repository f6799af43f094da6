"""Prompts to text states: the published prompt wrapping, and a T5 encoder.

Legend: B prompts, L tokens, D width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


def wrap_prompt(prompt: str, *, fps: float | None, image: bool, noise_std: float | None, aspect: str | None) -> str:
    """Wrap a prompt in what the model was trained to read around it, in the published order: rate, noise level, aspect.

    The unconditional prompt is the same wrapping around the empty string.

    Args:
        prompt: the caption, with its task prefix if it has one.
        fps: frames per second, written as a whole number; None: the model is not conditioned on it (no line at all).
        image: where `fps` is given, say that this is an image instead. A rate below 1 counts as an image too.
        noise_std: σ of the data noise, written as int(1000 σ); None: the model is not conditioned on it.
        aspect: for example "16:9"; None: the model has one aspect.

    Example:
        >>> wrap_prompt("a dog", fps=16, image=False, noise_std=0.5, aspect="16:9")
        'Noise Level 500:\\nA video with 16 fps:\\na dog\\n\\n in a 16:9 aspect ratio.\\n'
    """
    if fps is not None:
        kind = "An image" if image or int(fps) < 1 else f"A video with {int(fps)} fps"
        prompt = f"{kind}:\n{prompt}\n"
    if noise_std is not None:
        prompt = f"Noise Level {int(1000 * noise_std)}:\n{prompt}"
    if aspect is not None:
        prompt = f"{prompt}\n in a {aspect} aspect ratio.\n"
    return prompt


class TextStates(NamedTuple):
    """Encoded prompts."""

    states: Tensor
    """float32 (B, L, D), zero at padding."""
    cut: tuple[str, ...]
    """Per prompt what did not fit into L tokens and was not read; empty where everything fitted."""


class TextEncoder:
    """A T5 encoder with its tokenizer.

    Args:
        model: a `T5EncoderModel`.
        tokenizer: its tokenizer.
        tokens: L, every prompt is padded or cut to this many tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, tokens: int):
        self.model, self.tokenizer, self.tokens = model.eval().requires_grad_(False), tokenizer, tokens

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.d_model)

    def states(self, prompts: list[str]) -> Tensor:
        """Last hidden states × attention mask, padded to L: float32 (B, L, D). Prompts are taken as they are: wrap them first."""
        device = next(self.model.parameters()).device
        batch = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt").to(device)
        states = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return states.float() * batch["attention_mask"][..., None]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextStates:
        """`states` without gradient, and what was cut."""
        return TextStates(self.states(prompts), tuple(map(self._cut, prompts)))

    def _cut(self, prompt: str) -> str:
        """The end of a prompt that truncation drops (the tokenizer keeps the first L − 1 tokens and the end token)."""
        ids = self.tokenizer(prompt, verbose=False)["input_ids"]
        return self.tokenizer.decode(ids[self.tokens - 1 :], skip_special_tokens=True) if len(ids) > self.tokens else ""


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """The library's bars would mix with the command line's own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def text_shapes(text_encoder: str | Path) -> Any:
    """The T5 encoder of a folder on the `meta` device: how large it is; no weights are read. Raises ValueError where there is none."""
    from transformers import T5Config, T5EncoderModel

    try:
        config = T5Config.from_pretrained(str(text_encoder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{text_encoder}: no T5 encoder's configuration ({(str(error).splitlines() or [''])[0][:200]})") from None
    with torch.device("meta"):
        return T5EncoderModel(config)


def load_text_encoder(
    text_encoder: str | Path, tokenizer: str | Path, tokens: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Load a T5 encoder from local folders (a full T5's folder serves too: its decoder is left out).

    Raises:
        ValueError: a folder is missing or holds no T5, its weights are incomplete, or the tokenizer does not fit the encoder.
    """
    from transformers import AutoTokenizer, T5EncoderModel

    for folder in (text_encoder, tokenizer):
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder; a model folder has text_encoder/ and tokenizer/")
    try:
        with no_progress_bar():
            model, info = T5EncoderModel.from_pretrained(
                str(text_encoder), dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        words = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{text_encoder}: no T5 encoder with its tokenizer can be loaded ({reason})") from None
    wrong = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise ValueError(f"{text_encoder}: {len(wrong)} tensors are missing, extra or misshaped ({', '.join(wrong[:3])})")
    if len(words) > model.config.vocab_size:
        raise ValueError(f"{tokenizer}: {len(words)} words, the text encoder has {model.config.vocab_size}; they do not fit")
    return TextEncoder(model.to(torch.device(device)), words, tokens)
