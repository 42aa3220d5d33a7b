"""Engines that are not models of ours: any OpenAI-compatible server, and a folder of pictures made elsewhere.

``diptych evaluate http://host:8000/v1 mini --remote-model NAME`` asks a server for answers (``/chat/completions``),
pictures (``/images/generations``) and edits (``/images/edits``). ``diptych evaluate folder:DIR geneval=FILE`` scores
pictures in the layout that the benchmark's official scripts write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL.Image

from diptych.core.sample import Image, Message, Sample, Text
from diptych.data.decoding import open_picture
from diptych.evaluation import files
from diptych.evaluation.addresses import NO_KEY, public_address
from diptych.evaluation.judges.judge import call
from diptych.evaluation.scores import Item
from diptych.generation.events import Answer, Picture
from diptych.parts.images import data_uri, png_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class RemoteSettings:
    """Sampler settings that are sent with a request where they are not None."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True)
class RemoteModel:
    """The identity of a model behind a server; ``url`` is without secrets."""

    url: str
    family: str = "endpoint"
    settings: RemoteSettings = field(default_factory=RemoteSettings)


class Endpoint:
    """A model behind an OpenAI-compatible server. ``url`` may hold a user, password and query; ``shown_url`` does not.
    ``thinking`` is sent as ``enable_thinking`` where it is not None. Raises ``ValueError`` without a model's name."""

    def __init__(
        self, url: str, model: str, key: str = NO_KEY, timeout: float = 600.0, thinking: bool | None = None
    ) -> None:
        self.shown_url = public_address(url)
        if not model:
            raise ValueError(f"{self.shown_url} needs the name of a model there: --remote-model NAME")
        self.model, self.name, self._url, self._key = RemoteModel(self.shown_url), model, url, key
        self.timeout, self.thinking = timeout, thinking

    def with_thinking(self, thinking: bool) -> Endpoint:
        """The same server, asked to think before it answers, or not to."""
        return Endpoint(self._url, self.name, self._key, self.timeout, thinking)

    def _call(self, request: Callable[[Any], Any]) -> Any:
        return call(self._url, self._key, self.timeout, request)

    def settings(self, changes: dict[str, Any]) -> RemoteSettings:
        """The settings with ``changes``. Raises ``ValueError`` for a setting that is not sent to servers."""
        known = asdict(self.model.settings)
        if unknown := sorted(changes.keys() - known.keys()):
            raise ValueError(f"unknown settings {unknown}; an endpoint is sent {', '.join(known)}")
        return replace(self.model.settings, **changes)

    def answers(
        self,
        samples: Sequence[Sample],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        batch_size: int,
        top_p: float = 1.0,
    ) -> list[Answer]:
        """One answer for each sample; up to ``batch_size`` requests run at the same time."""

        more: dict[str, Any] = {}
        if self.thinking is not None:
            more["extra_body"] = {"chat_template_kwargs": {"enable_thinking": self.thinking}}

        if top_p != 1:
            more["top_p"] = top_p

        def one(sample: Sample) -> Answer:
            messages = [{"role": m.role, "content": _content(m)} for m in sample.messages]
            reply = self._call(
                lambda client: client.chat.completions.create(
                    model=self.name,
                    messages=messages,
                    max_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed,
                    **more,
                )
            )
            parameters = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
            choice = reply.choices[0]
            return Answer(choice.message.content or "", (), choice.finish_reason or "", parameters)

        with ThreadPoolExecutor(batch_size) as pool:
            return list(pool.map(one, samples))

    def draw(
        self,
        samples: Sequence[Sample],
        seeds: Sequence[int],
        size: tuple[int, int] | None = None,
        settings: RemoteSettings | None = None,
        batch_size: int = 32,
    ) -> list[Picture]:
        """One picture per sample, from its seed; a sample with pictures is an edit. Raises ``ValueError`` for a picture
        of another size than asked for."""
        more = {k: v for k, v in asdict(settings or self.model.settings).items() if v is not None}

        def one(sample: Sample, seed: int) -> Picture:
            prompt = sample.prompt
            asked: dict[str, Any] = {"model": self.name, "prompt": prompt, "n": 1, "extra_body": {"seed": seed, **more}}
            if size is not None:
                asked["size"] = f"{size[0]}x{size[1]}"
            sources = [("source.png", png_bytes(i.pixels), "image/png") for i in sample.images()]
            reply = self._call(
                lambda client: (
                    client.images.edit(image=sources, response_format="b64_json", **asked)
                    if sources
                    else client.images.generate(response_format="b64_json", **asked)
                )
            )
            url = self.shown_url
            if not (reply.data and reply.data[0].b64_json):
                raise ValueError(f"{url} sent no picture for {prompt!r}")
            image = open_picture(files.decoded(reply.data[0].b64_json, url), f"of {url} for {prompt!r}")
            if size is not None and image.size != size:
                raise ValueError(f"{url} sent a picture of {image.size}, asked for one of {size}")
            return Picture(image, prompt, seed, {"size": list(image.size), "seed": seed, **more})

        with ThreadPoolExecutor(batch_size) as pool:
            return list(pool.map(one, samples, seeds))


def _content(message: Message) -> str | list[dict]:
    """The parts of a message; the text alone of a system message, which some servers take in no other form."""
    if message.role == "system":
        return "\n".join(part.text for part in message.parts if isinstance(part, Text))
    return [_part(part) for part in message.parts]


def _part(part: Text | Image) -> dict:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image_url", "image_url": {"url": data_uri(part.pixels)}}


# --- pictures made elsewhere ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoSettings:
    """No settings: it is unknown how the pictures were made."""


@dataclass(frozen=True)
class PicturesModel:
    """The identity of pictures made elsewhere: the name of their folder."""

    folder: str
    family: str = "pictures"
    settings: NoSettings = field(default_factory=NoSettings)


class PictureFolder:
    """A folder of pictures made elsewhere, in the official layout of the benchmark. A missing or broken picture is a
    failure of its item, named."""

    def __init__(self, folder: str | Path, name: str = "") -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"there is no folder {str(folder)!r}")
        self.model, self.name = PicturesModel(self.folder.name), name or self.folder.name
        self.places: dict[str, Item] = {}
        self.listed: dict[Path, dict[str, list[Path]]] = {}

    def expect(self, items: Sequence[Item]) -> None:
        """Sets the items to look for; an item's ``place`` is the path of its picture. Raises ``ValueError`` where the
        folder has none of them, and where its ``metadata.jsonl`` (of GenEval) has another prompt."""
        self.places |= {item.id: item for item in items}
        self.listed.clear()
        geneval = [item for item in items if "/samples/" in item.place]
        described = {self.folder / Path(item.place).parts[0] / "metadata.jsonl": item for item in geneval}
        for file, item in described.items():
            if file.is_file() and (prompt := files.field(files.load(file), ("prompt",), str(file))) != item.prompt:
                raise ValueError(f"{file} says {prompt!r}, the benchmark {item.prompt!r}: other prompts were drawn")
        if items and not any(self._file(item.id)[0] for item in items):
            raise ValueError(
                f"{self.folder} holds none of the {len(items)} pictures, such as {self._file(items[0].id)[1]}"
            )

    def settings(self, changes: dict[str, Any]) -> NoSettings:
        """No settings. Raises ``ValueError`` for any: the pictures are made."""
        if changes:
            raise ValueError(f"pictures of a folder are made already; they take no {', '.join(changes)}")
        return NoSettings()

    def answers(self, samples: Sequence[Sample], *rest: Any) -> list[Answer]:
        """Nothing: raises ``ValueError``."""
        raise ValueError(f"{self.folder} is a folder of pictures; it answers no questions")

    def draw(
        self,
        samples: Sequence[Sample],
        seeds: Sequence[int],
        size: tuple[int, int] | None = None,
        settings: Any = None,
        batch_size: int = 32,
    ) -> list[Picture]:
        """The picture of each sample's item, as it is."""
        return [Picture(self._find(s.id), "", seed, {}) for s, seed in zip(samples, seeds, strict=True)]

    def _find(self, id: str) -> PIL.Image.Image:
        file, wanted = self._file(id)
        if file is None:
            raise ValueError(f"there is no {wanted}")
        tile, image = self.places[id].place.partition("#")[2], open_picture(file)
        return cut(image, int(tile)) if tile else image

    def _file(self, id: str) -> tuple[Path | None, str]:
        """The file of an item's picture, of any format, and the pattern of its name. A number may have more or fewer
        leading zeros (GenEval's page says 0000.png, its scripts write 00000.png)."""
        place = (self.places[id].place or f"{id}.png").partition("#")[0]
        stem = (self.folder / place).with_suffix("")
        if stem.parent not in self.listed:
            there = self.listed[stem.parent] = {}
            for f in sorted(stem.parent.iterdir()) if stem.parent.is_dir() else ():
                if f.suffix.lower() in SUFFIXES:
                    there.setdefault(_number(f.stem), []).append(f)
        numbered = self.listed[stem.parent].get(_number(stem.name), ())
        best = min(numbered, key=lambda f: (f.stem != stem.name, SUFFIXES.index(f.suffix.lower())), default=None)
        return best, f"{stem}{{{','.join(SUFFIXES)}}}"


def _number(name: str) -> str:
    return name.lstrip("0").zfill(1) if name.isdecimal() else name


def cut(image: PIL.Image.Image, tile: int, across: int = 2) -> PIL.Image.Image:
    """One tile of a picture that holds several, counted row by row."""
    w, h = image.width // across, image.height // across
    row, column = divmod(tile, across)
    return image.crop((column * w, row * h, (column + 1) * w, (row + 1) * h))


def tiled(images: Sequence[PIL.Image.Image], across: int = 2) -> PIL.Image.Image:
    """Pictures of one size tiled in one, row by row; missing tiles are black."""
    w, h = images[0].size
    sheet = PIL.Image.new("RGB", (across * w, -(-len(images) // across) * h))
    for i, image in enumerate(images):
        row, column = divmod(i, across)
        sheet.paste(image, (column * w, row * h))
    return sheet
