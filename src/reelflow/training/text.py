"""A small T5 encoder with a tokenizer of its own, in the file formats of any other T5."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from reelflow.adapters.text import TextEncoder
from reelflow.training.config import TextConfig


def new_text_encoder(config: TextConfig, tokens: int, captions: Iterable[str]) -> TextEncoder:
    """An untrained T5 encoder; the tokenizer (byte-level BPE, so that no prompt is unreadable) is fitted to `captions`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=tokens)
    shape = T5Config(
        vocab_size=len(fast),
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=2 * config.width,
        num_layers=config.layers,
        num_heads=config.heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    return TextEncoder(T5EncoderModel(shape), fast, tokens)
