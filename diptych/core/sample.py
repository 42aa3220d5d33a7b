"""Samples: conversations of text and pictures, before tokenization.

A user's jsonl row, a training sample and a chat request have the same schema::

    {"id": "cats/7", "messages": [
        {"role": "user", "content": [
            {"type": "image", "image": "cats/7.png"},
            {"type": "text", "text": "How many cats are there?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]}]}

Each picture has a ``role``: ``understand`` (the model reads it), ``condition`` (an edit source: the model reads it and
keeps its details) or ``target`` (the model generates it). By default a user's picture is ``understand`` and an
assistant's picture is ``target``; a user's text carries no loss and an assistant's text does. The keys ``"role"`` and
``"loss"`` of a part override this.

A request is a sample that ends with an *open turn* of the assistant: ``assistant()`` asks for text,
``assistant(Image(None, "target", size))`` asks for a picture. Everything before it is context.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import PIL.Image

from diptych.core.tensors import Tensor

Speaker = Literal["system", "user", "assistant"]
ImageRole = Literal["understand", "condition", "target"]


def check_text(text: str, name: str = "text", nul: bool = False) -> str:
    """The text, if every encoder can write it. Raises ``ValueError`` that names the text (``name``), the character and
    its place: a lone surrogate (U+D800 to U+DFFF), or NUL (U+0000) unless ``nul`` allows it."""
    if bad := (_SURROGATE if nul else _UNWRITABLE).search(text):
        kind = "NUL" if bad.group() == "\0" else "a lone surrogate"
        raise ValueError(
            f"{name} holds {kind} (U+{ord(bad.group()):04X}) at character {bad.start()}, which cannot be encoded"
        )
    return text


_SURROGATE, _UNWRITABLE = re.compile("[\ud800-\udfff]"), re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Text:
    """A run of text; ``loss`` says whether the model is trained on it. Raises ``ValueError`` for a lone surrogate. (A
    model may generate NUL; what users give is checked for it where it comes in.)"""

    text: str
    loss: bool = False

    def __post_init__(self) -> None:
        check_text(self.text, nul=True)


@dataclass(frozen=True)
class Image:
    """A picture and its role. ``image`` is a path relative to the data set, a decoded picture, or None.

    ``size``: (width, height) in pixels of a target that is still to be generated.
    ``nearest``: the colours are labels, so the picture is resized with nearest-neighbour interpolation.
    ``encoded``: precomputed features by encoder name (``diptych data precompute``); such a picture keeps its ``size``
    and may have no pixels.
    ``reading``: the name of the size rule at which it is read, where a family has several; None: the model's own.
    ``masked``: the share of its tokens, in [0, 1], that the model sees as blanks; only for role ``understand``.
    """

    image: str | PIL.Image.Image | None
    role: ImageRole = "understand"
    size: tuple[int, int] | None = None
    nearest: bool = False
    encoded: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    masked: float = 0.0
    reading: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.masked <= 1:
            raise ValueError(f"the masked share of a picture's tokens must lie in [0, 1], not {self.masked}")
        if self.masked and self.role != "understand":
            raise ValueError(f"masked is {self.masked}, but only a picture to understand can be masked, no {self.role}")

    @property
    def blank(self) -> bool:
        """Whether the picture has neither pixels nor features: it is still to be generated."""
        return self.image is None and not self.encoded

    @property
    def dimensions(self) -> tuple[int, int]:
        """(width, height) in pixels; also known for a precomputed picture without pixels."""
        return self.size if self.image is None and self.size else self.pixels.size

    def through(self, encoder: str, see: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """(``image``, ``encoded``) of a segment that a frozen ``encoder`` reads: its precomputed features and True, or
        ``see()``, the tensor to encode, and False."""
        return (self.encoded[encoder], True) if encoder in self.encoded else (see(), False)

    @property
    def pixels(self) -> PIL.Image.Image:
        """The decoded RGB picture. Raises ``ValueError`` while it is still a path."""
        if not isinstance(self.image, PIL.Image.Image):
            if self.encoded:
                raise ValueError(f"picture has no pixels, only the features of {', '.join(self.encoded)}")
            raise ValueError(
                f"picture {self.image!r} has not been decoded; open it with diptych.data.decoding.open_picture"
            )
        return self.image


Part = Text | Image


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: who speaks, and the texts and pictures in order."""

    role: Speaker
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Sample:
    """One training or evaluation row. ``id`` seeds the sample's random draws (core/noise.py).

    ``info`` holds data for scorers (the scene, the expected answer, masks); no model sees it.
    """

    id: str
    messages: tuple[Message, ...]
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def images(self) -> Iterator[Image]:
        """Every picture in order."""
        return (part for message in self.messages for part in message.parts if isinstance(part, Image))

    @property
    def has_target(self) -> bool:
        """Whether a training learns anything from the sample: it has a text with loss or a picture to draw."""
        parts = (part for message in self.messages for part in message.parts)
        return any(part.role == "target" if isinstance(part, Image) else part.loss and part.text for part in parts)

    @property
    def is_open(self) -> bool:
        """Whether the sample is a request, which ends with an open turn."""
        last = self.messages[-1] if self.messages else None
        return bool(last and last.role == "assistant" and (not last.parts or _to_draw(last.parts[-1])))

    @property
    def drawing(self) -> tuple[int, int] | None:
        """(message, part) of the picture to generate: the open turn of a request, or the last target of a training
        sample. None where the last message asks for no picture."""
        if not self.messages or self.messages[-1].role != "assistant":
            return None
        if self.is_open:
            return (len(self.messages) - 1, len(self.messages[-1].parts) - 1) if self.messages[-1].parts else None
        places = [(i, j) for i, m in enumerate(self.messages) for j, p in enumerate(m.parts) if _is_target(p)]
        return places[-1] if places else None

    @property
    def request_at(self) -> int | None:
        """Index of the last user message before the picture to generate, or of the last user message."""
        before = self.drawing[0] if self.drawing else len(self.messages)
        return next((i for i in reversed(range(before)) if self.messages[i].role == "user"), None)

    @property
    def request(self) -> Message | None:
        """The user's message that the generated picture or the answer responds to."""
        return None if self.request_at is None else self.messages[self.request_at]

    @property
    def prompt(self) -> str:
        """The text of the request."""
        return " ".join(p.text for p in (self.request.parts if self.request else ()) if isinstance(p, Text))

    def map_images(self, change) -> Sample:
        """The same sample with ``change(Image) -> Image`` applied to every picture."""
        return replace(
            self,
            messages=tuple(
                replace(m, parts=tuple(change(p) if isinstance(p, Image) else p for p in m.parts))
                for m in self.messages
            ),
        )


def _is_target(part: Part) -> bool:
    return isinstance(part, Image) and part.role == "target"


def _to_draw(part: Part) -> bool:
    return isinstance(part, Image) and part.blank


def user(*parts: str | Part) -> Message:
    """A user's message; plain strings become texts without loss. Raises ``ValueError`` as ``check_text`` does."""
    return Message("user", tuple(Text(check_text(p)) if isinstance(p, str) else p for p in parts))


def assistant(*parts: str | Part) -> Message:
    """An assistant's message; plain strings become texts with loss. Raises ``ValueError`` as ``check_text`` does."""
    return Message("assistant", tuple(Text(check_text(p), loss=True) if isinstance(p, str) else p for p in parts))


def sample_from_json(row: Any, default_id: str = "") -> Sample:
    """The sample that a JSON row describes. Raises ``ValueError`` naming the offending key, value and the choices."""
    _keys(row, "row", required={"messages"}, optional={"id", "info"})
    if not isinstance(row["messages"], list) or not row["messages"]:
        raise ValueError("'messages' must be a list with at least one message")
    messages = tuple(_message(m, f"messages[{i}]") for i, m in enumerate(row["messages"]))
    info = row.get("info", {})
    if not isinstance(info, dict):
        raise ValueError(f"'info' must be an object, not {info!r}")
    return Sample(check_text(str(row.get("id", default_id)), "'id'", nul=True), messages, info)


def sample_to_json(sample: Sample) -> dict:
    """The JSON row of a sample whose pictures are paths; ``sample_from_json`` reads it back equal."""

    def part(p: Part) -> dict:
        if isinstance(p, Text):
            return {"type": "text", "text": p.text, "loss": p.loss}
        if isinstance(p.image, PIL.Image.Image) or p.encoded:
            raise ValueError(f"sample {sample.id!r} holds a decoded picture; save it and put its path in the sample")
        more: dict[str, Any] = ({"nearest": True} if p.nearest else {}) | ({"size": list(p.size)} if p.size else {})
        more |= ({"masked": p.masked} if p.masked else {}) | ({"reading": p.reading} if p.reading else {})
        return {"type": "image", "image": p.image, "role": p.role} | more

    messages = [{"role": m.role, "content": [part(p) for p in m.parts]} for m in sample.messages]
    return {"id": sample.id, "messages": messages} | ({"info": dict(sample.info)} if sample.info else {})


def _message(row: Any, where: str) -> Message:
    _keys(row, where, required={"role", "content"})
    _choice(row["role"], get_args(Speaker), f"{where}.role")
    content = [{"type": "text", "text": row["content"]}] if isinstance(row["content"], str) else row["content"]
    if not isinstance(content, list) or not content:
        raise ValueError(f"{where}.content must be a text or a list with at least one part, not {content!r}")
    return Message(row["role"], tuple(_part(p, row["role"], f"{where}.content[{i}]") for i, p in enumerate(content)))


def _part(row: Any, speaker: Speaker, where: str) -> Part:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, not {row!r}")
    _choice(row.get("type"), ("text", "image"), f"{where}.type")
    if row["type"] == "text":
        _keys(row, where, required={"type", "text"}, optional={"loss"})
        if not isinstance(row["text"], str):
            raise ValueError(f"{where}.text must be a string, not {row['text']!r}")
        loss = row.get("loss", speaker == "assistant")
        if not isinstance(loss, bool):
            raise ValueError(f"{where}.loss must be true or false, not {loss!r}")
        return Text(check_text(row["text"], f"{where}.text"), loss)
    _keys(row, where, required={"type", "image"}, optional={"role", "size", "nearest", "masked", "reading"})
    if not isinstance(row["image"], (str, Path)) or not str(row["image"]):
        raise ValueError(f"{where}.image must be a path, not {row['image']!r}")
    role = row.get("role", "target" if speaker == "assistant" else "understand")
    _choice(role, get_args(ImageRole), f"{where}.role")
    size = row.get("size")
    if size is not None:
        if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(type(s) is int and s > 0 for s in size)):
            raise ValueError(f"{where}.size must be [width, height] in pixels, not {size!r}")
        size = (size[0], size[1])
    nearest = row.get("nearest", False)
    if not isinstance(nearest, bool):
        raise ValueError(f"{where}.nearest must be true or false, not {nearest!r}")
    masked = row.get("masked", 0.0)
    if not (isinstance(masked, (int, float)) and 0 <= masked <= 1):
        raise ValueError(f"{where}.masked must be a number in [0, 1], not {masked!r}")
    reading = row.get("reading")
    if not (reading is None or isinstance(reading, str)):
        raise ValueError(f"{where}.reading must be the name of a size rule, not {reading!r}")
    return Image(str(row["image"]), role, size, nearest, masked=float(masked), reading=reading)


def _keys(row: Any, where: str, required: set[str], optional: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, not {row!r}")
    if missing := sorted(required - row.keys()):
        raise ValueError(f"{where} lacks {missing}")
    if unknown := sorted(map(str, row.keys() - required - optional)):
        raise ValueError(f"{where} has unknown keys {unknown}; known: {sorted(required | optional)}")


def _choice(value: Any, choices: tuple[str, ...], where: str) -> None:
    if value not in choices:
        raise ValueError(f"{where} is {value!r}; choose from {', '.join(choices)}")
