"""Image generations and edits in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import PIL.Image
from starlette.datastructures import FormData, UploadFile

from diptych.core.sample import Image, Sample, user
from diptych.data.decoding import open_alpha
from diptych.generation.events import ImageDone, ImagePreview, Stop
from diptych.generation.scheduler import Draw
from diptych.serving.pictures import base64_text, decode, encode
from diptych.serving.schemas import EditsRequest, ImagesRequest, Limits
from diptych.serving.service import Service, _seed, _size
from diptych.serving.stream import _sse
from diptych.serving.worker import Call, Worker

# ---- pictures -----------------------------------------------------------------------------------------------------


class Gallery:
    """The pictures of one request to draw or to edit."""

    def __init__(
        self, service: Service, worker: Worker, body: ImagesRequest, sources: Sequence[PIL.Image.Image], mask: Any
    ) -> None:
        self.service, self.worker, self.body, self.mask = service, worker, body, mask
        self.kind = "image_edit" if sources else "image_generation"
        limits = service.limits
        if body.n > limits.n:
            raise ValueError(f"n may be at most {limits.n}, not {body.n}")
        self.seed, self.created = _seed(body), int(time.time())
        prompt = service.text(body.prompt, "prompt")
        negative = service.text(body.negative_prompt or "", "negative_prompt")
        sample = Sample("request", (user(*(Image(s, "condition") for s in sources), prompt),))
        settings, size = service.settings(worker.engine, body, sample), _size(body.size)
        self.requests = [
            Draw(sample, self.seed + i, size, settings, negative, body.partial_images) for i in range(body.n)
        ]
        self.first = sources[0] if sources else None
        self.read = 0  # tokens

    def begin(self, call: Call) -> None:
        call.submit(*self.requests)

    def _file(self, image: PIL.Image.Image) -> bytes:
        if self.mask is not None and self.first is not None:
            image = PIL.Image.composite(image, self.first.resize(image.size), self.mask.resize(image.size))
        return encode(image, self.body.output_format, self.body.output_compression)

    async def follow(self, call: Call) -> AsyncIterator[tuple[int, ImagePreview | Stop, bytes]]:
        """Previews, and the ends of pictures, with their files."""
        files: dict[int, bytes] = {}
        async for i, event in call.follow():
            if isinstance(event, ImageDone):
                files[i] = await asyncio.to_thread(self._file, event.image)
            elif isinstance(event, ImagePreview):
                yield i, event, await asyncio.to_thread(self._file, event.image)
            elif isinstance(event, Stop):
                self.read += event.usage.read
                yield i, event, files.pop(i)

    def about(self, size: Sequence[int], read: int) -> dict[str, Any]:
        """What OpenAI's clients want to know of a picture."""
        used = {"input_tokens": read, "output_tokens": 0, "total_tokens": read}
        return {
            "model": self.worker.engine.name,
            "size": f"{size[0]}x{size[1]}",
            "output_format": self.body.output_format,
            "background": "opaque",
            "quality": "auto",
            "usage": used | {"input_tokens_details": {"text_tokens": read, "image_tokens": 0}},
        }

    async def whole(self, call: Call, base: str) -> dict[str, Any]:
        """All pictures at once."""
        data: list[dict[str, Any]] = [{} for _ in self.requests]
        parameters: dict[str, Any] = {}
        async for i, event, file in self.follow(call):
            assert isinstance(event, Stop)
            parameters = dict(event.parameters) | {"seed": self.seed, "n": self.body.n}
            data[i] = {"seed": self.seed + i, "revised_prompt": None}
            if self.body.response_format == "url":
                kind = self.body.output_format
                key = self.service.store.put(file, f"image/{kind}", f"picture.{kind}")
                data[i]["url"] = f"{base}v1/files/{key}/content"
            else:
                data[i]["b64_json"] = base64_text(file)
        about = self.about(parameters["size"], self.read)
        return about | {"created": self.created, "parameters": parameters, "data": data}

    async def pieces(self, call: Call) -> AsyncIterator[str]:
        """Previews and pictures as they come, as server-sent events."""
        seen = [0] * len(self.requests)
        async for i, event, file in self.follow(call):
            row: dict[str, Any] = {"b64_json": base64_text(file), "created_at": self.created, "index": i}
            if isinstance(event, ImagePreview):
                name = f"{self.kind}.partial_image"
                about = self.about(event.image.size, 0)
                del about["usage"]
                row |= about | {"partial_image_index": seen[i], "step": event.step, "of": event.of}
                seen[i] += 1
            else:
                name, told = f"{self.kind}.completed", dict(event.parameters)
                row |= self.about(told["size"], event.usage.read) | {"seed": told["seed"], "parameters": told}
            yield _sse({"type": name} | row, name)


# ---- forms --------------------------------------------------------------------------------------------------------


async def _form(form: FormData, service: Service) -> tuple[EditsRequest, list[PIL.Image.Image], Any]:
    """The fields, sources and mask of an edit's form."""
    fields: dict[str, Any] = {}
    sources: list[PIL.Image.Image] = []
    mask: PIL.Image.Image | None = None
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            data = await value.read()
            if name in ("image", "image[]"):
                if len(sources) == service.limits.pictures:
                    raise ValueError(f"image: at most {service.limits.pictures} pictures")
                sources.append(await decode(data, f"image[{len(sources)}]", service.limits))
            elif name == "mask" and mask is None:
                mask = await asyncio.to_thread(_mask, data, service.limits)
            else:
                raise ValueError(f"unknown or repeated file {name[:60]!r}; files are image (several) and mask")
        elif name in ("image", "image[]", "mask"):
            raise ValueError(f"{name} must be a file")
        elif name in fields:
            raise ValueError(f"{name[:60]} is given twice")
        else:
            fields[name] = value
    if "settings" in fields:
        try:
            fields["settings"] = json.loads(fields["settings"])
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"settings must be a JSON object: {error}") from error
    body = EditsRequest.model_validate(fields)
    if not sources:
        raise ValueError("image is missing: an edit starts from one or several pictures")
    if mask is not None and mask.size != sources[0].size:
        raise ValueError(
            f"mask is {mask.width}x{mask.height} and the first image {sources[0].width}x{sources[0].height}"
        )
    return body, sources, mask


def _mask(data: bytes, limits: Limits) -> PIL.Image.Image:
    """White where the mask is transparent: where the picture may change."""
    return PIL.Image.eval(open_alpha(data, "mask", limits.pixels), lambda alpha: 255 if alpha == 0 else 0)
