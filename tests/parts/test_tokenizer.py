"""The tokenizer: any text survives, both file formats agree, special tokens stay apart."""

import json
import pickle

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.parts.tokenizer import Tokenizer

TINY = Tokenizer.tiny()
MARKERS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
TEXTS = ["a red circle left of two blue squares", "Ünïcödé 漢字 😀", "  two  spaces\n\n\ttab ", "it's 2026: don't", ""]


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_survives(text):
    ids = TINY.encode(text)
    assert all(0 <= i < len(TINY) for i in ids)
    # Words are learned with the space before them, so a first word gets one and decoding takes one off the front.
    assert TINY.decode(ids) == text.removeprefix(" ")


def test_markers_have_ids_and_are_not_decoded():
    ids = [TINY.id(marker) for marker in MARKERS]
    assert len(set(ids)) == 4 and TINY.decode(ids) == ""
    with pytest.raises(ValueError, match=r"no token '<\|nothing\|>'"):
        TINY.id("<|nothing|>")


def test_pickle_and_save(tmp_path):
    TINY.save(tmp_path)
    for copy in (pickle.loads(pickle.dumps(TINY)), Tokenizer.load(tmp_path)):
        assert len(copy) == len(TINY)
        assert [copy.encode(t) for t in TEXTS] == [TINY.encode(t) for t in TEXTS]


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds neither tokenizer.json nor vocab.json with merges.txt"):
        Tokenizer.load(tmp_path)


def learned() -> tokenizers.Tokenizer:
    """A made-up vocabulary with Qwen2's splitting rule, learned from a few sentences."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    rule = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(tokenizers.Regex(rule), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXTS * 4, trainer)
    return inner


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Tokenizer, Tokenizer]:
    """One vocabulary written as vocab.json + merges.txt + tokenizer_config.json, and as tokenizer.json."""
    old, new = tmp_path_factory.mktemp("qwen2"), tmp_path_factory.mktemp("json")
    inner = learned()
    inner.model.save(str(old))
    first = inner.get_vocab_size()
    added = {str(first + i): {"content": m, "special": True} for i, m in enumerate(MARKERS)}
    # out of order, as a dictionary may be
    (old / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": dict(reversed(added.items()))}))
    inner.add_special_tokens([tokenizers.AddedToken(m, special=True) for m in MARKERS])
    inner.save(str(new / "tokenizer.json"))
    return Tokenizer.load(old), Tokenizer.load(new)


def test_both_formats_agree(both):
    old, new = both
    assert len(old) == len(new)
    assert [old.id(m) for m in MARKERS] == [new.id(m) for m in MARKERS]
    assert [old.encode(t) for t in TEXTS] == [new.encode(t) for t in TEXTS]


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_both_formats_agree_on_any_text(both, text):
    import unicodedata

    old, new = both
    ids = old.encode(text)
    assert ids == new.encode(text)
    assert old.decode(ids) == unicodedata.normalize("NFC", text)


def test_qwen2_files_load_like_transformers_reads_them(both, tmp_path):
    """transformers' own Qwen2 tokenizer over the same two files."""
    import transformers

    old, _ = both
    inner = learned()
    inner.model.save(str(tmp_path))
    theirs = transformers.Qwen2Tokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        assert old.encode(text) == theirs.encode(text, add_special_tokens=False), text


def test_trained_tokenizer_covers_every_byte():
    small = Tokenizer.train(["aa ab"], 300, MARKERS)
    assert [small.id(m) for m in MARKERS] == [0, 1, 2, 3]
    text = bytes(range(1, 128)).decode() + "é漢😀"
    assert small.decode(small.encode(text)).endswith(text)
