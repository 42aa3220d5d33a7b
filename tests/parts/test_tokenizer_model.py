"""``tokenizer.model`` of SentencePiece (InternLM2, Llama) against sentencepiece itself."""

from __future__ import annotations

import json

import pytest
import sentencepiece

from diptych.parts.tokenizer import Tokenizer

TEXTS = [
    "a red circle left of a blue star",
    "  two  spaces, and a tab\tand a line\nbreak ",
    "Ünïcödé, 漢字, emoji \U0001f600 and bytes \x07",
    "",
    "1234567890 + 42 = ?",
    "<s> is text, </s> too",
]


@pytest.fixture(scope="module", params=[True, False], ids=["with a prefix", "without"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text.txt").write_text("\n".join([*TEXTS, *(f"how many {w} stars are there" for w in "abcdefgh")] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        add_dummy_prefix=request.param,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


def test_ids_are_those_of_sentencepiece(trained):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(trained / "tokenizer.model"))
    ours = Tokenizer.load(trained)
    assert len(ours) == theirs.vocab_size() and Tokenizer.there(trained)
    for text in [*TEXTS, "every star is blue", "two red squares above a circle"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.piece(theirs.encode("a star")[-1]).strip() in "a star"


def test_markers_of_the_config_are_added_at_their_ids(trained):
    size = len(Tokenizer.load(trained))
    config = trained / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": {str(size): {"content": "<|im_start|>", "special": True}}}))
    try:
        tokenizer = Tokenizer.load(trained)
        assert tokenizer.id("<|im_start|>") == size and len(tokenizer) == size + 1
        assert size not in tokenizer.encode("<|im_start|>") and tokenizer.encode_markup("<|im_start|>") == [size]
    finally:
        config.unlink()


def test_a_model_without_bytes_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=90,
        minloglevel=3,
    )
    with pytest.raises(ValueError, match="tokenizer.model has no byte pieces"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="cannot read .*tokenizer.model"):
        Tokenizer.load(tmp_path)
