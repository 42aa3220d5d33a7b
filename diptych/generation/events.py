"""The events of a running request, and the results of a finished one.

Every result carries its seed and the parameters that were in effect, defaults included."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image


@dataclass(frozen=True)
class TokenLogprob:
    """The text of a token, its log-probability, and (text, log-probability) of the likeliest tokens at its position."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """More of the answer's text; ``logprobs`` where the request asks for them."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ReasoningDelta:
    """More of what the model thinks before its answer or its picture."""

    text: str


@dataclass(frozen=True, eq=False)
class ImagePreview:
    """A preview of the picture after ``step`` of ``steps`` steps."""

    image: PIL.Image.Image
    step: int
    steps: int


@dataclass(frozen=True, eq=False)
class ImageDone:
    """A finished picture."""

    image: PIL.Image.Image
    seed: int


@dataclass(frozen=True)
class Usage:
    """Prompt tokens, generated tokens, and pictures drawn."""

    read: int = 0
    written: int = 0
    pictures: int = 0


@dataclass(frozen=True)
class Stop:
    """The last event of a request. ``reason`` is ``stop`` (the model ended its answer), ``length`` (``max_new_tokens``
    was reached) or ``image`` (the picture is finished)."""

    reason: str
    usage: Usage
    parameters: Mapping[str, Any] = field(default_factory=dict)


Event = TextDelta | ReasoningDelta | ImagePreview | ImageDone | Stop


@dataclass(frozen=True)
class Answer:
    """A finished answer. ``ids`` are its tokens, ``images`` are the pictures that the model drew in it, and
    ``reasoning`` is the text of its ``<think>`` tags. ``sources`` are the pictures of the conversation.

    A notebook shows the text with all pictures; ``print`` prints the text."""

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    parameters: Mapping[str, Any]
    images: tuple[PIL.Image.Image, ...] = ()
    reasoning: str = ""
    sources: tuple[PIL.Image.Image, ...] = ()

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        sources, images = (f"<div>{''.join(map(_figure, images))}</div>" for images in (self.sources, self.images))
        return f"{sources}<p>{html.escape(self.text)}</p>{images}"


@dataclass(frozen=True, eq=False)
class Picture:
    """A finished picture, and the plan that it was drawn from (``reasoning``) where the model wrote one.

    ``model`` is the name of the model. A notebook shows the picture with its prompt and seed."""

    image: PIL.Image.Image
    prompt: str
    seed: int
    parameters: Mapping[str, Any]
    reasoning: str = ""
    model: str = ""

    def describe(self) -> dict[str, Any]:
        """The parameters of the picture as JSON types: model, prompt, seed, size, settings, plan, and the version of
        diptych."""
        from diptych import __version__

        row = {"model": self.model, "prompt": self.prompt, **self.parameters, "seed": self.seed}
        return row | ({"reasoning": self.reasoning} if self.reasoning else {}) | {"diptych": __version__}

    def save(self, file: str | Path) -> Path:
        """Writes the picture with its parameters (``diptych show FILE`` prints them) and returns the path.

        The format is that of the suffix: .png, .jpg or .webp. Raises ``ValueError`` for another suffix, and for an
        existing file that diptych did not write."""
        from diptych.data.written import save_picture

        path = Path(file).expanduser()
        save_picture(self.image, path, self.describe())
        return path

    def _repr_html_(self) -> str:
        return _figure(self.image, f"{self.prompt} · seed {self.seed}")


@dataclass(frozen=True, eq=False)
class Pictures(Sequence[Picture]):
    """The pictures of one request: picture i has seed ``seed + i`` and was drawn from the plan ``reasoning[i]``.

    ``pictures[i]`` is a ``Picture``. A notebook shows all of them with their seeds."""

    images: list[PIL.Image.Image]
    prompt: str
    seed: int
    parameters: Mapping[str, Any]
    reasoning: tuple[str, ...] = ()
    model: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # negative indices and the error of a list
        plan = self.reasoning[i] if self.reasoning else ""
        return Picture(self.images[i], self.prompt, self.seed + i, self.parameters, plan, self.model)

    def __iter__(self) -> Iterator[Picture]:
        return (self[i] for i in range(len(self)))

    def grid(self, columns: int = 4) -> PIL.Image.Image:
        """All pictures on one sheet, each with its seed, ``columns`` to a line."""
        from diptych.data.contact_sheet import grid

        return grid(self.images, [f"seed {p.seed}" for p in self], columns)

    def save(self, file: str | Path) -> list[Path]:
        """Writes every picture as ``Picture.save`` does and returns the paths: ``file`` for one picture, and for
        several the name of ``file`` with ``-0``, ``-1`` ... appended."""
        from diptych.data.written import numbered

        return [picture.save(name) for picture, name in zip(self, numbered(Path(file), len(self)), strict=True)]

    def _repr_html_(self) -> str:
        figures = "".join(_figure(p.image, f"seed {p.seed}") for p in self)
        return f"<p>{html.escape(self.prompt)}</p><div>{figures}</div>"


def _figure(image: PIL.Image.Image, caption: str = "") -> str:
    """An HTML figure of a picture; small pictures are enlarged without smoothing."""
    from diptych.parts.images import data_uri

    style = "display:inline-block;margin:4px;text-align:center"
    size = "width:160px;image-rendering:pixelated" if max(image.size) <= 160 else "max-width:320px"
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure style="{style}"><img src="{data_uri(image)}" style="{size}">{text}</figure>'
