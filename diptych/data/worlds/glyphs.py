"""Small worlds for a language model that learns to see: digits small and large, and words to remember.

``glyphs/number`` and ``glyphs/shape`` ask about one picture: a large pale shape and, on it, a number of two digits in
strokes of a 32nd of a side. ``glyphs/say`` and ``glyphs/draw`` are one large digit on one of three grounds, as a
picture to describe and to draw; ``.../noisy`` has damaged pixels and wrong labels. ``words/fact``, ``words/sum`` and
``words/reverse`` hold no picture: they measure what a language model forgets
while it learns to see.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import PIL.Image

from diptych.core.sample import Image, assistant, user
from diptych.data.canvas import Generated, Made, pick, picture

FONT = (
    "111101101101111",
    "010110010010111",
    "111001111100111",
    "111001111001111",
    "101101111001001",
    "111100111001111",
    "111100111101111",
    "111001001001001",
    "111101111101111",
    "111101111001111",
)  # 3 x 5 pixels, row by row
SHAPES = ("circle", "square", "triangle")
PALE = ((250, 220, 220), (220, 245, 220), (220, 225, 250), (250, 245, 205))
GROUNDS = {"red": (225, 95, 90), "green": (95, 185, 110), "blue": (95, 130, 225)}
NOISE, WRONG = 0.03, 0.15  # shares of damaged pixels and of wrong labels
FACTS = 200
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _mask(text: str) -> np.ndarray:
    """The digits of a text side by side, a pixel apart."""
    glyphs = [np.array([c == "1" for c in FONT[int(t)]]).reshape(5, 3) for t in text]
    gap = np.zeros((5, 1), bool)
    return np.concatenate([p for g in glyphs for p in (g, gap)][:-1], 1)


def _print(pixels: np.ndarray, mask: np.ndarray, row: int, column: int, unit: int, colour: tuple) -> None:
    big = mask.repeat(unit, 0).repeat(unit, 1)
    part = pixels[row * unit : row * unit + big.shape[0], column * unit : column * unit + big.shape[1]]
    part[big] = colour


# --- a number too small for a small picture ---------------------------------------------------------------------------


def numbers(split: str) -> list[str]:
    """The numbers of a split; every seventh is kept for the test."""
    return [f"{n:02d}" for n in range(100) if (n % 7 == 3) == (split == "test")]


def page(rng: np.random.Generator, split: str, size: int) -> tuple[PIL.Image.Image, str, str]:
    """(picture, number, shape). Digits stand on a lattice of an eighth of a side."""
    pixels = np.full((size, size, 3), 255, np.uint8)
    shape, number = pick(rng, SHAPES), pick(rng, numbers(split))
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5 - rng.uniform(-0.08, 0.08, (2, 1, 1))
    inside = {
        "circle": x**2 + y**2 < 0.16,
        "square": np.maximum(abs(x), abs(y)) < 0.36,
        "triangle": (y < 0.36) & (y > 2 * abs(x) - 0.4),
    }[shape]
    pixels[inside] = pick(rng, PALE)
    row, column = 4 * int(rng.integers(7)), 4 * int(rng.integers(7))  # in 32nds of a side
    _print(pixels, _mask(number), row, column, max(1, size // 32), (20, 20, 30))
    return picture(pixels), number, shape


def make_number(rng: np.random.Generator, split: str, size: int) -> Made:
    """A question about the number on a page, and the answer."""
    image, number, _ = page(rng, split, size)
    return (user(Image(image), "read the number"), assistant(number)), {"type": "number", "answer": number}


def make_shape(rng: np.random.Generator, split: str, size: int) -> Made:
    """A question about the shape of a page, and the answer."""
    image, _, shape = page(rng, split, size)
    return (user(Image(image), "which shape is it?"), assistant(shape)), {"type": "shape", "answer": shape}


# --- a large digit ----------------------------------------------------------------------------------------------------


def render(digit: int, ground: str, row: int, column: int, size: int) -> np.ndarray:
    """(size, size, 3): a digit of 10 x 6 sixteenths of a side at (row, column) sixteenths."""
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[:] = GROUNDS[ground]
    _print(pixels, _mask(str(digit)).repeat(2, 0).repeat(2, 1), row, column, max(1, size // 16), (250, 250, 250))
    return pixels


PLACES = tuple((r, c) for r in range(0, 7, 2) for c in range(0, 11, 2))


def _digit(rng: np.random.Generator, size: int, noisy: bool) -> tuple[PIL.Image.Image, str, dict]:
    digit, ground = int(rng.integers(10)), pick(rng, tuple(GROUNDS))
    row, column = pick(rng, PLACES)
    pixels = render(digit, ground, row, column, size)
    label = (digit, ground)
    if noisy:
        damaged = rng.random((size, size)) < NOISE
        pixels[damaged] = rng.integers(0, 256, (int(damaged.sum()), 3))
        if rng.random() < WRONG:
            label = (int(rng.integers(10)), pick(rng, tuple(GROUNDS)))
    words = f"{label[0]} on {label[1]}"
    return picture(pixels), words, {"type": "say", "answer": words}


def _say(noisy: bool):
    def make(rng: np.random.Generator, split: str, size: int) -> Made:
        image, words, info = _digit(rng, size, noisy)
        return (user(Image(image), "what is it?"), assistant(words)), info

    return make


def _draw(noisy: bool):
    def make(rng: np.random.Generator, split: str, size: int) -> Made:
        image, words, info = _digit(rng, size, noisy)
        return (user(words), assistant(Image(image, "target"))), info | {"type": "draw"}

    return make


def read_back(image: PIL.Image.Image) -> tuple[str, float]:
    """The words of the nearest picture that could be drawn, and how far off that is (root mean square, 0 to 255)."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    words, every = _templates(pixels.shape[0])
    off = ((every - pixels.reshape(-1)) ** 2).mean(1)
    return words[int(off.argmin())], float(off.min() ** 0.5)


@cache
def _templates(size: int) -> tuple[list[str], np.ndarray]:
    kinds = [(d, g, *p) for d in range(10) for g in GROUNDS for p in PLACES]
    every = np.stack([render(*k, size).reshape(-1) for k in kinds]).astype(np.float32)
    return [f"{d} on {g}" for d, g, *_ in kinds], every


# --- words ------------------------------------------------------------------------------------------------------------


@cache
def facts() -> tuple[tuple[str, str], ...]:
    """Keys of three letters and the two digits that belong to each, the same for ever."""
    rng = np.random.default_rng(0)
    keys = sorted({" ".join(rng.choice(list(LETTERS), 3)) for _ in range(2 * FACTS)})[:FACTS]
    return tuple((key, f"{int(rng.integers(100)):02d}") for key in keys)


def make_fact(rng: np.random.Generator, split: str, size: int) -> Made:
    """A key of three letters, and the two digits that belong to it."""
    key, value = pick(rng, facts())
    return (user(key), assistant(value)), {"type": "fact", "answer": value}


def make_sum(rng: np.random.Generator, split: str, size: int) -> Made:
    """The sum of two digits."""
    a, b = (int(n) for n in rng.integers(0, 10, 2))
    return (user(f"{a} plus {b}"), assistant(str(a + b))), {"type": "sum", "answer": str(a + b)}


def make_reverse(rng: np.random.Generator, split: str, size: int) -> Made:
    """Four letters, and the same letters in reverse order."""
    letters = list(rng.choice(list(LETTERS[:12]), 4))
    answer = " ".join(letters[::-1])
    return (user("turn " + " ".join(letters)), assistant(answer)), {"type": "reverse", "answer": answer}


SOURCES = {
    "glyphs/number": make_number,
    "glyphs/shape": make_shape,
    "glyphs/say": _say(False),
    "glyphs/draw": _draw(False),
    "glyphs/say/noisy": _say(True),
    "glyphs/draw/noisy": _draw(True),
    "words/fact": make_fact,
    "words/sum": make_sum,
    "words/reverse": make_reverse,
}


def source(name: str, split: str = "train", size: int = 64, seed: int = 0) -> Generated:
    """An endless source. Raises ``ValueError`` for a name that is not in ``SOURCES``."""
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; there are {', '.join(SOURCES)}")
    return Generated(name, SOURCES[name], split, size, seed)
