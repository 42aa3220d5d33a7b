"""Text to ids and back: a byte-level BPE from the ``tokenizers`` library, with named special tokens.

Reads ``tokenizer.json``; ``vocab.json`` with ``merges.txt`` (Qwen2's files) and the added tokens of
``tokenizer_config.json``; or ``tokenizer.model``, a BPE of SentencePiece (InternLM2, Llama). ``Tokenizer.tiny()`` ships
with the package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from diptych.machine.extras import install

SPACE = "\u2581"  # how SentencePiece writes a space
TINY = Path(__file__).with_name("tokenizer_tiny.json")


class Tokenizer:
    """Encodes without adding tokens: families add their own markers. It can be pickled, so worker processes can use
    it."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self.inner = inner
        self.inner.encode_special_tokens = (
            True  # a marker in a user's text is encoded as text, not as the special token
        )

    def __len__(self) -> int:
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_markup(self, text: str) -> list[int]:
        """The ids of a template's text, in which special tokens are tokens."""
        return [i for ids, rest in self.pieces(text) for i in (ids or self.encode(rest))]

    def pieces(self, text: str) -> list[tuple[list[int], str]]:
        """A template's text cut at its special tokens: ([id], "") for each of them, ([], text) for what is between."""
        special = self.special
        pieces = re.split("(" + "|".join(map(re.escape, special)) + ")", text) if special else [text]
        return [([self.id(p)], "") if p in special else ([], p) for p in pieces if p]

    @property
    def special(self) -> list[str]:
        """The special tokens."""
        return [t.content for t in self.inner.get_added_tokens_decoder().values()]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out."""
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def decode_markup(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens spelled out."""
        return self.inner.decode(list(ids), skip_special_tokens=False)

    def adding(self, tokens: Iterable[str]) -> Tokenizer:
        """The same tokenizer with these special tokens, the new ones at its end in this order."""
        lacking = [t for t in tokens if self.inner.token_to_id(t) is None]
        if not lacking:
            return self
        inner = tokenizers.Tokenizer.from_str(self.inner.to_str())
        inner.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in lacking])
        return Tokenizer(inner)

    def id(self, token: str) -> int:
        """The id of a special token. Raises ``ValueError`` when the vocabulary lacks it."""
        number = self.inner.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer has no token {token!r}")
        return number

    def piece(self, number: int) -> str:
        """The text of one token inside a text, its leading space kept; empty for an id without a token."""
        token = self.inner.id_to_token(number) or ""
        if SPACE in token:  # SentencePiece
            return token.replace(SPACE, " ")
        return decoders.ByteLevel().decode([token]) if token else ""

    def save(self, folder: Path, split: bool = False) -> None:
        """Writes ``tokenizer.json``; with ``split`` also Qwen2's other files (vocab.json, merges.txt and
        tokenizer_config.json) where the tokenizer splits text as Qwen2's does."""
        self.inner.save(str(folder / "tokenizer.json"))
        if split and self._like_qwen2():
            self.inner.model.save(str(folder))
            added = {
                str(i): {
                    "content": t.content,
                    "special": t.special,
                    "normalized": t.normalized,
                    "lstrip": t.lstrip,
                    "rstrip": t.rstrip,
                    "single_word": t.single_word,
                }
                for i, t in sorted(self.inner.get_added_tokens_decoder().items())
            }
            config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
            (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))

    def _like_qwen2(self) -> bool:
        steps = (json.loads(self.inner.to_str())["pre_tokenizer"] or {}).get("pretokenizers", [])
        return any(step.get("pattern") == {"Regex": QWEN2} for step in steps)

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """The tokenizer of a folder. Raises ``ValueError`` when it holds no tokenizer files or they cannot be read."""
        folder = Path(folder)
        if not Tokenizer.there(folder):
            raise ValueError(
                f"{folder} holds neither tokenizer.json nor vocab.json with merges.txt nor tokenizer.model"
            )
        if (file := folder / "tokenizer.json").is_file():
            return Tokenizer(_read(file, lambda: tokenizers.Tokenizer.from_file(str(file))))
        vocab, merges, config = (folder / n for n in ("vocab.json", "merges.txt", "tokenizer_config.json"))
        if not (vocab.is_file() and merges.is_file()):
            inner = _sentencepiece(folder / "tokenizer.model")
        else:
            inner = tokenizers.Tokenizer(_read(vocab, lambda: models.BPE.from_file(str(vocab), str(merges))))
            inner.pre_tokenizer = _splitter()
            inner.normalizer = tokenizers.normalizers.NFC()
            inner.decoder = decoders.ByteLevel()
        if config.is_file():
            added = _read(config, lambda: json.loads(config.read_text())).get("added_tokens_decoder", {})
            for number, token in sorted(added.items(), key=lambda item: int(item[0])):
                flags = {k: token[k] for k in ("lstrip", "rstrip", "single_word", "normalized") if k in token}
                new = tokenizers.AddedToken(token["content"], special=token.get("special", True), **flags)
                (inner.add_special_tokens if new.special else inner.add_tokens)([new])
                if (actual := inner.token_to_id(new.content)) != int(number):
                    raise ValueError(f"{config}: {new.content!r} is to have id {number}, but it would have {actual}")
        return Tokenizer(inner)

    @staticmethod
    def there(folder: Path) -> bool:
        """Whether a folder holds the files of a tokenizer."""
        files = ("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",)
        return any(all((folder / name).is_file() for name in some) for some in files)

    @staticmethod
    def tiny() -> Tokenizer:
        """The tokenizer that ships with the package: trained on the text of the embedded data, with Qwen2's markers."""
        return Tokenizer(tokenizers.Tokenizer.from_file(str(TINY)))

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int, special: list[str]) -> Tokenizer:
        """A byte-level BPE learned from ``texts``; every byte is in it, so any text can be encoded."""
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=True
        )  # a word is one token also at the beginning of a text
        inner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return Tokenizer(inner)

    def __reduce__(self):
        return _restore, (self.inner.to_str(),)


def _sentencepiece(file: Path) -> tokenizers.Tokenizer:
    """The BPE of a SentencePiece model with byte fallback. Its scores are the order of merges.

    Raises ``ValueError`` for a model without byte pieces, which cannot encode every text."""
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError(f"{file} needs the package sentencepiece: {install('hf')}") from error
    model = _read(file, lambda: sentencepiece.SentencePieceProcessor(model_file=str(file)))
    size = model.vocab_size()
    if not any(model.is_byte(i) for i in range(size)):
        raise ValueError(f"{file} has no byte pieces; only a BPE with byte fallback can be read")
    vocab = {model.id_to_piece(i): i for i in range(size)}
    merges = []
    for piece, number in vocab.items():
        if model.is_byte(number) or model.is_control(number) or model.is_unknown(number):
            continue
        splits = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        known = sorted((vocab[a], vocab[b], a, b) for a, b in splits if a in vocab and b in vocab)
        merges += [(-model.get_score(number), a, b) for _, _, a, b in known]
    merges.sort(key=lambda merge: merge[0])
    unknown = model.id_to_piece(model.unk_id())
    bpe = models.BPE(vocab, [(a, b) for _, a, b in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    inner = tokenizers.Tokenizer(bpe)
    prefix = [normalizers.Prepend(SPACE)] if model.encode("a", out_type=str)[0].startswith(SPACE) else []
    inner.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    marks = [model.id_to_piece(i) for i in range(size) if model.is_control(i) or model.is_unknown(i)]
    inner.add_special_tokens([tokenizers.AddedToken(piece, special=True, normalized=False) for piece in marks])
    return inner


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _read(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"cannot read {file}: {error}") from error


def _restore(text: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text))


# How Qwen2's byte-level BPE splits text before merging.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
