"""Prompt wrapping as published, and a tiny T5 with a tiny tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, T5ForConditionalGeneration

from reelflow.adapters.text import TextEncoder, load_text_encoder, wrap_prompt

WORDS = "a red blue ball box moves right left and on black background".split()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "a dog"),
        ({"fps": 16}, "A video with 16 fps:\na dog\n"),
        ({"fps": 16.0}, "A video with 16 fps:\na dog\n"),
        ({"fps": 23.976}, "A video with 23 fps:\na dog\n"),
        ({"fps": 16, "image": True}, "An image:\na dog\n"),
        ({"fps": 0}, "An image:\na dog\n"),
        ({"image": True}, "a dog"),
        ({"noise_std": 0.3}, "Noise Level 300:\na dog"),
        ({"noise_std": 0.5}, "Noise Level 500:\na dog"),
        ({"aspect": "16:9"}, "a dog\n in a 16:9 aspect ratio.\n"),
        (
            {"fps": 16, "noise_std": 0.5, "aspect": "16:9"},
            "Noise Level 500:\nA video with 16 fps:\na dog\n\n in a 16:9 aspect ratio.\n",
        ),
        (
            {"fps": 16, "noise_std": 0.5, "aspect": "1:1", "prompt": ""},
            "Noise Level 500:\nA video with 16 fps:\n\n\n in a 1:1 aspect ratio.\n",
        ),
        ({"fps": 8, "prompt": "(extend) a dog"}, "A video with 8 fps:\n(extend) a dog\n"),
    ],
)
def test_wrapping(settings: dict, expected: str) -> None:
    options = {"prompt": "a dog", "fps": None, "image": False, "noise_std": None, "aspect": None, **settings}
    assert wrap_prompt(options.pop("prompt"), **options) == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text_encoder/`, `tokenizer/`, and `whole/` with a T5 that has a decoder too."""
    path = tmp_path_factory.mktemp("text")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(
        path / "tokenizer"
    )
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(WORDS) + 3, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    T5EncoderModel(config).save_pretrained(path / "text_encoder")
    T5ForConditionalGeneration(config).save_pretrained(path / "whole")
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(folder / "text_encoder", folder / "tokenizer", 7)


def test_states_are_padded_to_length_and_zero_there(encoder: TextEncoder) -> None:
    states, cut = encoder.encode(["a red ball", "", "a red ball moves right and"])
    assert states.shape == (3, 7, encoder.width)
    assert states.dtype == torch.float32
    assert cut == ("", "", "")
    lengths = (states.abs().sum(-1) > 0).sum(-1)
    assert lengths.tolist() == [4, 1, 7], "words and the end token"


def test_states_are_the_last_hidden_states(encoder: TextEncoder) -> None:
    batch = encoder.tokenizer(["a red ball"], return_tensors="pt")
    with torch.no_grad():
        expected = encoder.model(**batch).last_hidden_state
    torch.testing.assert_close(encoder.encode(["a red ball"]).states[:, :4], expected, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_said(encoder: TextEncoder) -> None:
    states, cut = encoder.encode(["a ball", "a red ball moves right and a blue box moves left"])
    assert cut == ("", "a blue box moves left")
    kept = encoder.encode(["a red ball moves right and"]).states
    torch.testing.assert_close(states[1:], kept)


def test_half_precision_still_gives_float32(folder: Path) -> None:
    encoder = load_text_encoder(folder / "text_encoder", folder / "tokenizer", 7, dtype=torch.bfloat16)
    assert next(encoder.model.parameters()).dtype == torch.bfloat16
    assert encoder.encode(["a ball"]).states.dtype == torch.float32


def test_a_whole_t5_serves_without_its_decoder(folder: Path) -> None:
    encoder = load_text_encoder(folder / "whole", folder / "tokenizer", 7)
    assert isinstance(encoder.model, T5EncoderModel)
    assert encoder.encode(["a ball"]).states.isfinite().all()


def test_nothing_is_printed_while_loading(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_text_encoder(folder / "text_encoder", folder / "tokenizer", 7)
    assert capfd.readouterr() == ("", "")


def test_folders_that_do_not_hold_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_text_encoder(tmp_path / "none", folder / "tokenizer", 7)
    with pytest.raises(ValueError, match="no T5 encoder") as error:
        load_text_encoder(tmp_path, folder / "tokenizer", 7)
    assert "\n" not in str(error.value)
    small = T5Config(vocab_size=5, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(small).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="15 words, the text encoder has 5"):
        load_text_encoder(tmp_path, folder / "tokenizer", 7)
    T5Config(vocab_size=5, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing, extra or misshaped"):
        load_text_encoder(tmp_path, folder / "tokenizer", 7)
