"""``/v1/images``: generations and edits."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import PIL.Image
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import FormData, UploadFile

from diptych.core.sample import Image, Sample, user
from diptych.data.decoding import open_mask
from diptych.generation.events import ImageDone, ImagePreview, ReasoningDelta, Stop
from diptych.generation.scheduler import ImageRequest
from diptych.parts.images import keep_outside
from diptych.serving.forms import FILE_SCHEMA, check_form, form_body
from diptych.serving.pictures import base64_text, decode, encode
from diptych.serving.schemas import EditsRequest, ImagesRequest
from diptych.serving.service import Service, seed_of
from diptych.serving.sse import EventStream, server_sent
from diptych.serving.worker import Call, Worker


def router(service: Service) -> APIRouter:
    """The endpoints of ``/v1/images``."""
    routes = APIRouter()

    @routes.post("/v1/images/generations")
    async def generations(request: Request, body: ImagesRequest) -> Response:
        """Pictures of a prompt."""
        return await _respond(service, request, PictureRequest(service, body))

    @routes.post("/v1/images/edits", openapi_extra=form_body(_edits_schema()))
    async def edits(request: Request) -> Response:
        """Pictures changed by instruction; where a mask is given, only where it is transparent."""
        check_form(request)
        async with request.form(max_files=20, max_fields=40, max_part_size=64 * 1024) as fields:
            body, sources, mask = await _read_form(fields, service)
        return await _respond(service, request, PictureRequest(service, body, sources, mask))

    return routes


def _edits_schema() -> dict[str, Any]:
    schema = EditsRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schema["properties"] |= {"image": {"type": "array", "items": FILE_SCHEMA}, "mask": FILE_SCHEMA}
    schema["required"] = [*schema.get("required", []), "image"]
    return schema


async def _respond(service: Service, request: Request, pictures: PictureRequest) -> Response:
    body = pictures.body
    headers = service.warnings(pictures.worker, body, pictures.sample)
    call = service.begin(request, pictures.worker, pictures.submit, body, body.prompt)
    if body.stream:
        return EventStream(call, pictures.events(call), headers)
    try:
        return JSONResponse(await pictures.answer(call, str(request.base_url)), headers=headers)
    finally:
        call.end()


class PictureRequest:
    """A request for ``n`` pictures, drawn from its prompt or from ``sources``, and its answer in OpenAI's shape.

    ``mask`` is white where the first source may change."""

    def __init__(
        self,
        service: Service,
        body: ImagesRequest,
        sources: Sequence[PIL.Image.Image] = (),
        mask: PIL.Image.Image | None = None,
    ) -> None:
        self.service, self.body, self.mask = service, body, mask
        self.worker: Worker = service.worker(body.model)
        self.event = "image_edit" if sources else "image_generation"
        if body.n > service.limits.n:
            raise ValueError(f"n may be at most {service.limits.n}, not {body.n}")
        self.seed, self.created = seed_of(body), int(time.time())
        prompt = service.text(body.prompt, "prompt")
        negative = service.text(body.negative_prompt or "", "negative_prompt")
        self.sample = sample = Sample("request", (user(*(Image(s, "condition") for s in sources), prompt),))
        settings, size = service.settings(self.worker.engine, body, sample), body.canvas
        think = service.thinking(self.worker.engine, body, body.think)
        self.requests = [
            ImageRequest(sample, self.seed + i, size, settings, negative, body.partial_images, think)
            for i in range(body.n)
        ]
        self.plans = [""] * body.n
        self.first_source = sources[0] if sources else None
        self.prompt_tokens = 0

    def submit(self, call: Call) -> None:
        """Queues the pictures."""
        call.submit(*self.requests)

    def _file(self, image: PIL.Image.Image) -> bytes:
        if self.mask is not None and self.first_source is not None:
            image = keep_outside(self.mask, self.first_source, image)
        return encode(image, self.body.output_format, self.body.output_compression)

    async def _follow(self, call: Call) -> AsyncIterator[tuple[int, ImagePreview | Stop, bytes]]:
        """Previews and ends of pictures, with the picture's number and its file."""
        files: dict[int, bytes] = {}
        async for i, event in call.follow():
            if isinstance(event, ReasoningDelta):
                self.plans[i] += event.text
            if isinstance(event, ImageDone):
                files[i] = await asyncio.to_thread(self._file, event.image)
            elif isinstance(event, ImagePreview):
                yield i, event, await asyncio.to_thread(self._file, event.image)
            elif isinstance(event, Stop):
                self.prompt_tokens += event.usage.read
                yield i, event, files.pop(i)

    def _planned(self, i: int) -> dict[str, str]:
        """The plan of a picture, where it has one."""
        return {"reasoning_content": self.plans[i]} if self.plans[i] else {}

    def _about(self, size: Sequence[int], tokens: int) -> dict[str, Any]:
        """The fields that OpenAI's clients expect of each answer."""
        used = {"input_tokens": tokens, "output_tokens": 0, "total_tokens": tokens}
        return {
            "model": self.worker.engine.name,
            "size": f"{size[0]}x{size[1]}",
            "output_format": self.body.output_format,
            "background": "opaque",
            "quality": "auto",
            "usage": used | {"input_tokens_details": {"text_tokens": tokens, "image_tokens": 0}},
        }

    async def answer(self, call: Call, base_url: str) -> dict[str, Any]:
        """All pictures at once."""
        data: list[dict[str, Any]] = [{} for _ in self.requests]
        parameters: dict[str, Any] = {}
        async for i, event, file in self._follow(call):
            assert isinstance(event, Stop)
            parameters = dict(event.parameters) | {"seed": self.seed, "n": self.body.n}
            data[i] = {"seed": self.seed + i, "revised_prompt": None, **self._planned(i)}
            if self.body.response_format == "url":
                key = self.service.store.put(file, f"image/{self.body.output_format}")
                data[i]["url"] = f"{base_url}v1/files/{key}/content"
            else:
                data[i]["b64_json"] = base64_text(file)
        about = self._about(parameters["size"], self.prompt_tokens)
        return about | {"created": self.created, "parameters": parameters, "data": data}

    async def events(self, call: Call) -> AsyncIterator[str]:
        """Previews and pictures as they come, as server-sent events."""
        previews = [0] * len(self.requests)
        async for i, event, file in self._follow(call):
            row: dict[str, Any] = {"b64_json": base64_text(file), "created_at": self.created, "index": i}
            if isinstance(event, ImagePreview):
                name = f"{self.event}.partial_image"
                about = self._about(event.image.size, 0)
                del about["usage"]
                row |= about | {"partial_image_index": previews[i], "step": event.step, "of": event.steps}
                previews[i] += 1
            else:
                name, parameters = f"{self.event}.completed", dict(event.parameters)
                row |= self._about(parameters["size"], event.usage.read)
                row |= {"seed": parameters["seed"], "parameters": parameters, **self._planned(i)}
            yield server_sent({"type": name} | row, name)


# ---- forms --------------------------------------------------------------------------------------------------------


async def _read_form(
    form: FormData, service: Service
) -> tuple[EditsRequest, list[PIL.Image.Image], PIL.Image.Image | None]:
    """The fields, sources and mask of an edit's form. Raises ``ValueError`` for what is unknown, missing or
    repeated."""
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
                mask = await asyncio.to_thread(open_mask, data, "mask", service.limits.pixels)
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
    first = sources[0]
    if mask is not None and mask.size != first.size:
        raise ValueError(f"mask is {mask.width}x{mask.height} and the first image {first.width}x{first.height}")
    return body, sources, mask
