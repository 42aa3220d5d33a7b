"""Builds diptych/parts/tokenizer_tiny.json: a byte-level BPE of 1,024 tokens over the words of the embedded data.

python scripts/build_tokenizer.py
"""

from collections.abc import Iterator

from diptych.core.sample import Text
from diptych.data.worlds import embedded
from diptych.parts.tokenizer import TINY, Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
ROWS = {
    "shapes/draw": 3000,
    "shapes/ask": 3000,
    "shapes/caption": 1500,
    "shapes/edit": 1500,
    "emoji64/draw": 1500,
    "emoji64/ask": 1500,
    "emoji64/edit": 800,
    "emoji/caption": 1500,
    "emoji/scenes": 500,
    "emoji/scenes-ask": 500,
}


def texts() -> Iterator[str]:
    """Every text of the first rows of each data set."""
    for name, rows in ROWS.items():
        source = embedded.source(name, size=16)
        for index in range(rows):
            for message in source[index].messages:
                yield from (p.text for p in message.parts if isinstance(p, Text))


if __name__ == "__main__":
    tokenizer = Tokenizer.train(texts(), 1024, SPECIAL)
    tokenizer.inner.save(str(TINY))
    for line in ("a red circle left of two blue stars", "is there a black cross?", "make the triangle purple"):
        print(line, "->", [tokenizer.decode([i]) for i in tokenizer.encode(line)])
    print(len(tokenizer), "tokens,", TINY.stat().st_size, "bytes")
