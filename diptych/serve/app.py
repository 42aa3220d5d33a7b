"""OpenAI's endpoints over diptych's engine, and the page.

::

    guard ──▶ endpoint ──▶ worker of the model: one running batch ──▶ events ──▶ JSON, or server-sent events

Any OpenAI client reads the answers; what OpenAI has no word for is added beside: ``parameters`` (those in effect, seeds
and defaults included), pictures as ``image_url`` parts of a chat's answer, previews of a chat's picture.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL.Image
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from diptych import __version__
from diptych.core.sample import Image, Message, Sample, Text, assistant, user
from diptych.data.images import open_alpha
from diptych.generate.engine import Engine
from diptych.generate.events import Event, ImageDone, ImagePreview, Stop, TextDelta, Usage, Word
from diptych.generate.scheduler import Draw, Say, Size
from diptych.models.protocol import UnifiedModel
from diptych.serve.guard import Guard, Keys, Rates, problem
from diptych.serve.metrics import Metrics, log
from diptych.serve.pictures import Store, base64_text, data_uri, decode, encode, fetch, from_data_uri
from diptych.serve.runs import Runs
from diptych.serve.schemas import ChatRequest, EditsRequest, ImagesRequest, Limits, TextPart, ToDraw
from diptych.serve.worker import Call, Refused, Worker

STATIC = Path(__file__).parent / "static"
FILES = {"app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}
SEEDS = 2**31  # of requests that say none


@dataclass(frozen=True)
class Options:
    """How a server behaves."""

    keys: tuple[str, ...] = ()  # none: everybody may
    slots: int = 16  # requests that run together, for each model
    queue: int = 64  # requests that may wait, for each model
    timeout: float = 120.0  # seconds for a request
    grace: float = 30.0  # seconds to finish at the end
    rate: float | None = None  # requests a minute, for each key (without keys: each address)
    hosts: frozenset[str] = frozenset()  # whose pictures may be fetched by URL; "*": any public host
    runs: Path | None = None  # folder of training runs to show
    log_prompts: bool = False
    quiet: bool = False  # no line for every request
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("slots", "queue", "timeout", "rate"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be more than 0, not {value}")
        if not self.grace >= 0:
            raise ValueError(f"grace must be at least 0, not {self.grace}")


class NotFound(ValueError):
    """Something asked for by name is not there."""


class Service:
    """The models of a server and what their endpoints share."""

    def __init__(self, engines: Sequence[Engine], options: Options) -> None:
        if len({e.name for e in engines}) != len(engines):
            raise ValueError(f"models must have different names, not {', '.join(e.name for e in engines)}")
        self.options, self.limits, self.metrics = options, options.limits, Metrics()
        self.pool = ThreadPoolExecutor(1, "model")  # models take turns: their steps use all cores
        o, drawn = options, options.limits.drawn
        self.workers = {e.name: Worker(e, self.pool, self.metrics, o.slots, o.queue, o.timeout, drawn) for e in engines}
        self.store, self.runs, self.created = Store(options.limits), Runs(options.runs), int(time.time())

    async def start(self) -> None:
        for worker in self.workers.values():
            await worker.start()
            if not worker.exact:
                log.warning("%s: pictures here depend, by a rounding, on their company", worker.engine.name)

    async def drain(self) -> None:
        """Lets what is in hand finish, then tells the rest."""
        await asyncio.gather(*(worker.close(self.options.grace) for worker in self.workers.values()))

    async def stop(self) -> None:
        await asyncio.gather(*(worker.stop() for worker in self.workers.values()))
        self.pool.shutdown()

    def worker(self, name: str | None) -> Worker:
        """The worker of a model; the first one where none is named. Raises ``NotFound``."""
        if name is None:
            return next(iter(self.workers.values()))
        if name not in self.workers:
            raise NotFound(f"no model {name[:100]!r}; here are: {', '.join(self.workers)}")
        return self.workers[name]

    def begin(
        self, request: Request, worker: Worker, submit: Callable[[Call], None], body: ToDraw, prompt: str
    ) -> Call:
        """A call that has been put in line, and that ends when its client leaves."""
        user = "" if body.user is None else f" user {body.user!r}"
        request.state.note = worker.engine.name + user + (f" {prompt!r}" if self.options.log_prompts else "")
        call = worker.call()
        try:
            submit(call)
        except (ValueError, Refused):
            call.end()
            raise
        call.watch(request.receive)
        return call

    # ---- what requests mean -------------------------------------------------------------------------------------

    def text(self, text: str, name: str) -> str:
        """The text, checked."""
        if len(text) > self.limits.prompt:
            raise ValueError(f"{name} has {len(text)} characters; at most {self.limits.prompt}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is not valid Unicode: half a surrogate pair") from error
        return text

    def settings(self, engine: Engine, body: ToDraw, sample: Sample) -> Any:
        """The settings that suit the request with its changes, checked by type, by the family and by the limits."""
        named = {
            "num_inference_steps": body.num_inference_steps or body.steps,
            "guidance_scale": body.guidance_scale,
            "image_guidance_scale": getattr(body, "image_guidance_scale", None),
        }
        given = {k: v for k, v in named.items() if v is not None}
        if twice := sorted(given.keys() & body.settings.keys()):
            raise ValueError(f"{', '.join(twice)} is given twice, also in settings")
        changes = given | body.settings
        engine.settings({k: None for k in changes})  # names
        try:
            own = engine.model.defaults(sample)
            chosen = TypeAdapter(type(own)).validate_json(json.dumps(asdict(own) | changes), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"settings{where and '.'}{where}: {_message(first)}") from error
        for name, value in asdict(chosen).items():
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(number, float) and not abs(number) <= 1e6:
                    raise ValueError(f"settings.{name} must be a finite number up to 1e6, not {number}")
        model, size = engine.model, _size(body.size)
        asked = replace(sample, messages=(*sample.messages, assistant(Image(None, "target", size))))
        steps = model.steps(model.canvas(asked), chosen)
        if steps > max(self.limits.steps, model.steps(model.canvas(_request()), model.settings)):  # its own will do
            raise ValueError(f"num_inference_steps may be at most {self.limits.steps}, not {steps}")
        return chosen

    async def picture(self, url: str, name: str) -> PIL.Image.Image:
        """The picture that a message points at: a data URI, an upload, or an address of an allowed host."""
        if url.startswith("data:"):
            return await decode(await asyncio.to_thread(from_data_uri, url, name), name, self.limits)
        if url.startswith(("http:", "https:")):
            if not self.options.hosts:
                raise ValueError(f"{name}: pictures by URL are not fetched here; send a data URI or an upload")
            return await decode(await asyncio.to_thread(fetch, url, self.options.hosts), name, self.limits)
        found = self.store.get(url)
        if found is None:
            raise ValueError(f"{name}: {url[:60]!r} is neither a data URI nor an upload that is still here")
        return await decode(found.data, name, self.limits)

    async def conversation(self, body: ChatRequest) -> Sample:
        """The messages as a sample. Where a picture is to be drawn, it starts from the user's last pictures."""
        if body.messages[-1].role != "user":
            raise ValueError(f"messages: the last message must be the user's, not the {body.messages[-1].role}'s")
        messages, pictures, length = [], 0, 0
        for i, m in enumerate(body.messages):
            parts: list[Text | Image] = []
            for j, part in enumerate(
                [TextPart(type="text", text=m.content)] if isinstance(m.content, str) else m.content
            ):
                name = f"messages[{i}].content[{j}]"
                if isinstance(part, TextPart):
                    length += len(part.text)
                    parts.append(Text(self.text(part.text, name)))
                    continue
                pictures += 1
                if pictures > self.limits.pictures:
                    raise ValueError(f"{name}: at most {self.limits.pictures} pictures in a conversation")
                url = part.image_url.url if part.type == "image_url" else part.file.file_id
                edited = m is body.messages[-1] and "image" in body.modalities
                role = "target" if m.role == "assistant" else "condition" if edited else "understand"
                parts.append(Image(await self.picture(url, name), role))  # type: ignore[arg-type]
            messages.append(Message("system" if m.role == "developer" else m.role, tuple(parts)))
        self.text("x" * length, "the conversation")
        return Sample("request", tuple(messages))

    def described(self, worker: Worker) -> dict[str, Any]:
        """The model as ``GET /v1/models`` shows it."""
        engine, options = worker.engine, self.options
        width, height = engine.model.canvas(_request())[::-1]
        return {
            "id": engine.name,
            "object": "model",
            "created": self.created,
            "owned_by": "diptych",
            "family": engine.model.family,
            "capabilities": capabilities(engine.model),
            "parameters": {"size": f"{width}x{height}", **asdict(engine.model.settings)},
            "limits": asdict(self.limits)
            | {"slots": options.slots, "queue": options.queue, "timeout_seconds": options.timeout},
            "exact_batching": worker.exact,
        }


def _request(*pictures: Image) -> Sample:
    return Sample("request", (user(*pictures, "a"), assistant(Image(None, "target"))))


def capabilities(model: UnifiedModel) -> dict[str, bool]:
    """What a family can be asked for: what it can lay out."""
    dot = PIL.Image.new("RGB", (64, 64))
    asked = {
        "understand": Sample("request", (user(Image(dot), "a"), assistant())),
        "generate": _request(),
        "edit": _request(Image(dot, "condition")),
    }
    able = {}
    for name, sample in asked.items():
        try:
            model.lay_out(sample)
            able[name] = True
        except ValueError:
            able[name] = False
    return able


def _size(text: str | None) -> Size | None:
    if text in (None, "auto"):
        return None
    width, height = text.split("x")  # type: ignore[union-attr]
    return int(width), int(height)


def _seed(body: ToDraw) -> int:
    return secrets.randbelow(SEEDS) if body.seed is None else body.seed


# ---- chat ---------------------------------------------------------------------------------------------------------


class Conversation:
    """The answers to a chat: ``n`` choices, each made of the modalities asked for, one after another."""

    def __init__(self, service: Service, worker: Worker, body: ChatRequest, sample: Sample) -> None:
        s, self.body, self.worker = service, body, worker
        self.id, self.created, self.seed = f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), _seed(body)
        wanted = body.max_tokens or body.max_completion_tokens or min(256, s.limits.new_tokens)
        if wanted > s.limits.new_tokens:
            raise ValueError(f"max_tokens may be at most {s.limits.new_tokens}, not {wanted}")
        if body.n > s.limits.n:
            raise ValueError(f"n may be at most {s.limits.n}, not {body.n}")
        for stop in body.stops:
            s.text(stop, "stop")
        self.wanted = wanted
        self.settings = s.settings(worker.engine, body, sample) if "image" in body.modalities else None
        self.negative = s.text(body.negative_prompt or "", "negative_prompt")
        self.turns = [sample] * body.n
        self.parts: list[list[dict[str, Any]]] = [[] for _ in range(body.n)]
        self.reasons, self.words = ["stop"] * body.n, [list[dict]() for _ in range(body.n)]
        self.owner: list[int] = []  # choice of each request submitted
        self.usage = Usage()
        self.parameters: dict[str, Any] = {"n": body.n, "modalities": body.modalities, "seed": self.seed}

    def begin(self, call: Call) -> None:
        first = self._next(0, self.turns[0])
        assert first
        if self.settings:
            self.worker.prepare(self._drawing(0, self.turns[0]))  # what could not be drawn is told now, not after words
        self.owner = list(range(self.body.n))
        call.submit(*(replace(first, seed=self.seed + i) for i in range(self.body.n)))

    def _next(self, choice: int, turn: Sample) -> Say | Draw | None:
        """The request for the choice's next part."""
        b, done = self.body, len(self.parts[choice])
        if done == len(b.modalities):
            return None
        if b.modalities[done] == "image":
            return self._drawing(choice, turn)
        logprobs = (b.top_logprobs or 0) if b.logprobs else None
        opened = replace(turn, messages=(*turn.messages, assistant()))
        return Say(opened, self.wanted, b.temperature, b.top_p, self.seed + choice, b.stops, logprobs, pictures=0)

    def _drawing(self, choice: int, turn: Sample) -> Draw:
        b = self.body
        opened = replace(turn, messages=(*turn.messages, assistant(Image(None, "target", _size(b.size)))))
        return Draw(opened, self.seed + choice, None, self.settings, self.negative, b.partial_images)

    async def follow(self, call: Call) -> AsyncIterator[tuple[int, Event]]:
        """Events with their choice; what has been said and drawn is kept in ``parts``."""
        said = [""] * self.body.n
        drawn: list[PIL.Image.Image | None] = [None] * self.body.n
        async for number, event in call.follow():
            choice = self.owner[number]
            if isinstance(event, TextDelta):
                said[choice] += event.text
                self.words[choice] += map(_logprob, event.words)
            if isinstance(event, ImageDone):
                drawn[choice] = event.image
            if isinstance(event, Stop):
                image, turn = drawn[choice], self.turns[choice]
                if event.reason == "image":
                    assert image
                    url = await asyncio.to_thread(data_uri, image)
                    self.parts[choice].append({"type": "image_url", "image_url": {"url": url}})
                    self.parameters["image"] = dict(event.parameters) | {"seed": self.seed}
                    message = assistant(Image(image, "target"))
                else:
                    self.parts[choice].append({"type": "text", "text": said[choice]})
                    self.reasons[choice] = event.reason
                    told = dict(event.parameters)
                    told["max_tokens"] = told.pop("max_new_tokens")
                    self.parameters |= told | {"stop": self.body.stops, "seed": self.seed}
                    message = assistant(said[choice])
                said[choice] = ""
                u, more = self.usage, event.usage
                self.usage = Usage(u.read + more.read, u.written + more.written, u.pictures + more.pictures)
                self.turns[choice] = replace(turn, messages=(*turn.messages, message))
                if following := self._next(choice, self.turns[choice]):
                    self.owner.append(choice)
                    call.submit(following)
            yield choice, event

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.worker.engine.name}

    def counted(self) -> dict[str, Any]:
        u = self.usage
        return {
            "prompt_tokens": u.read,
            "completion_tokens": u.written,
            "total_tokens": u.read + u.written,
            "pictures": u.pictures,
        }

    async def whole(self, call: Call) -> dict[str, Any]:
        """The answer at once."""
        async for _ in self.follow(call):
            pass
        choices = []
        for i, parts in enumerate(self.parts):
            plain = self.body.modalities == ["text"]
            message = {"role": "assistant", "content": parts[0]["text"] if plain else parts, "refusal": None}
            logprobs = {"content": self.words[i], "refusal": None} if self.body.logprobs else None
            choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": self.reasons[i]})
        head = self.head("chat.completion")
        return head | {"choices": choices, "usage": self.counted(), "parameters": self.parameters}

    async def pieces(self, call: Call) -> AsyncIterator[str]:
        """The answer as it comes, as server-sent events."""

        def chunk(i: int, delta: dict, logprobs: Any = None, reason: str | None = None, **more: Any) -> str:
            choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return _sse(self.head("chat.completion.chunk") | {"choices": [choice]} | more)

        for i in range(self.body.n):
            yield chunk(i, {"role": "assistant", "content": ""})
        async for i, event in self.follow(call):
            if isinstance(event, TextDelta):
                logprobs = {"content": [_logprob(w) for w in event.words]} if self.body.logprobs else None
                yield chunk(i, {"content": event.text}, logprobs)
            elif isinstance(event, ImagePreview):
                url = await asyncio.to_thread(data_uri, event.image)
                yield chunk(i, {"preview": {"url": url, "step": event.step, "of": event.of}})
            elif isinstance(event, Stop):
                if event.reason == "image":
                    yield chunk(i, {"content": [self.parts[i][-1]]})
                if len(self.parts[i]) == len(self.body.modalities):
                    yield chunk(i, {}, None, self.reasons[i], parameters=self.parameters)
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield _sse(self.head("chat.completion.chunk") | {"choices": [], "usage": self.counted()})
        yield "data: [DONE]\n\n"


def _logprob(word: Word) -> dict[str, Any]:
    def one(text: str, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    return one(word.text, word.logprob) | {"top_logprobs": [one(*likely) for likely in word.likeliest]}


def _told(error: Refused) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status == 400 else "server_error"
    return problem(str(error), error.code, kind=kind)


def _sse(row: dict[str, Any], event: str = "") -> str:
    return (f"event: {event}\n" if event else "") + f"data: {json.dumps(row)}\n\n"


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


class EventStream(Response):
    """Server-sent events of a call, which ends with them: finished, refused, or because the client has left."""

    media_type = "text/event-stream"

    def __init__(self, call: Call, pieces: AsyncIterator[str]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.call, self.pieces = call, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": b": in line\n\n", "more_body": True})
            try:
                async for piece in self.pieces:
                    await send({"type": "http.response.body", "body": piece.encode(), "more_body": True})
            except (Refused, ValueError) as error:
                told = _told(error) if isinstance(error, Refused) else problem(str(error), "invalid_value")
                body = _sse(told, "error").encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.call.end()


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


# ---- the application ----------------------------------------------------------------------------------------------


def create_app(engines: Sequence[Engine], options: Options | None = None) -> ASGIApp:
    """The server of these models as an ASGI application; ``.service`` holds its workers."""
    options = options or Options()
    service = Service(engines, options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.drain()
        await service.stop()

    api = FastAPI(
        title="diptych",
        version=__version__,
        description="Unified multimodal models behind OpenAI's endpoints.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )

    @api.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return JSONResponse(_told(error), error.status, headers)

    @api.exception_handler(RequestValidationError)
    @api.exception_handler(ValidationError)
    async def invalid(_: Request, error: Any) -> Response:
        return JSONResponse(_explained(error), 400)

    @api.exception_handler(ValueError)
    async def wrong(_: Request, error: ValueError) -> Response:
        if isinstance(error, NotFound):
            return JSONResponse(problem(str(error), "not_found"), 404)
        return JSONResponse(problem(str(error), "invalid_value", _about(str(error))), 400)

    @api.exception_handler(HTTPException)
    async def elsewhere(_: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_body")
        return JSONResponse(problem(str(error.detail), code), error.status_code, error.headers)

    @api.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return JSONResponse(problem("an error of the server; its log says more", "internal_error"), 500)

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models, what each can do, its defaults and the limits of a request."""
        return {"object": "list", "data": [service.described(w) for w in service.workers.values()]}

    @api.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """One model."""
        return service.described(service.worker(model))

    @api.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Words, pictures or both, in answer to a conversation that may show pictures."""
        worker = service.worker(body.model)
        talk = Conversation(service, worker, body, await service.conversation(body))
        call = service.begin(request, worker, talk.begin, body, str(body.messages[-1].content)[:1000])
        if body.stream:
            return EventStream(call, talk.pieces(call))
        try:
            return JSONResponse(await talk.whole(call))
        finally:
            call.end()

    async def draw(
        request: Request, body: ImagesRequest, sources: Sequence[PIL.Image.Image] = (), mask: Any = None
    ) -> Response:
        worker = service.worker(body.model)
        gallery = Gallery(service, worker, body, sources, mask)
        call = service.begin(request, worker, gallery.begin, body, body.prompt)
        if body.stream:
            return EventStream(call, gallery.pieces(call))
        try:
            return JSONResponse(await gallery.whole(call, str(request.base_url)))
        finally:
            call.end()

    @api.post("/v1/images/generations")
    async def generations(request: Request, body: ImagesRequest) -> Response:
        """Pictures of a prompt."""
        return await draw(request, body)

    form = EditsRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    file = {"type": "string", "format": "binary"}
    form["properties"] |= {"image": {"type": "array", "items": file}, "mask": file}
    form["required"] = [*form.get("required", []), "image"]

    @api.post(
        "/v1/images/edits",
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}},
    )
    async def edits(request: Request) -> Response:
        """Pictures changed by instruction. Only where the mask is transparent, if there is one."""
        _is_form(request)
        async with request.form(max_files=20, max_fields=40, max_part_size=64 * 1024) as fields:
            body, sources, mask = await _form(fields, service)
        return await draw(request, body, sources, mask)

    @api.post("/v1/files", openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {
        "schema": {"type": "object", "properties": {"file": file, "purpose": {"type": "string", "enum": ["vision"]}}}}}}})  # fmt: skip  # noqa: E501
    async def upload(request: Request) -> dict[str, Any]:
        """Keeps a picture for a while; messages refer to it by its id."""
        _is_form(request)
        async with request.form(max_files=1, max_fields=2, max_part_size=64 * 1024) as fields:
            if unknown := sorted(fields.keys() - {"file", "purpose"}):
                raise ValueError(f"{unknown[0][:60]} is unknown; an upload has file and purpose")
            if fields.get("purpose", "vision") not in ("vision", "user_data"):
                raise ValueError("purpose must be vision")
            if not isinstance(given := fields.get("file"), UploadFile):
                raise ValueError("file is missing")
            image = await decode(await given.read(), "file", service.limits)
        data = await asyncio.to_thread(encode, image)  # upright, and without its metadata
        key = service.store.put(data, "image/png", "picture.png")
        about = {"id": key, "object": "file", "bytes": len(data), "created_at": int(time.time())}
        until = int(time.time()) + service.limits.stored_seconds
        return about | {"filename": "picture.png", "purpose": "vision", "status": "processed", "expires_at": until}

    @api.get("/v1/files/{key}/content")
    async def content(key: str) -> Response:
        """A stored picture; its address cannot be guessed."""
        if (found := service.store.get(key)) is None:
            raise NotFound("no such file, or no longer")
        return Response(found.data, media_type=found.media)

    @api.delete("/v1/files/{key}")
    async def forget(key: str) -> dict[str, Any]:
        """Forgets an upload."""
        if not service.store.drop(key):
            raise NotFound("no such file, or no longer")
        return {"id": key, "object": "file", "deleted": True}

    @api.get("/v1/diptych/runs")
    async def runs() -> dict[str, Any]:
        """The training runs to look at."""
        return {"object": "list", "data": [{"id": name} for name in await asyncio.to_thread(service.runs.all)]}

    @api.get("/v1/diptych/runs/about")
    async def run(run: str) -> dict[str, Any]:
        """A run's recipe, stages and sheets of samples."""
        return await asyncio.to_thread(service.runs.about, run)

    @api.get("/v1/diptych/runs/metrics")
    async def numbers(run: str, after: int = -1, most: int = 500) -> dict[str, Any]:
        """What a run wrote of its steps after ``after``, thinned to ``most`` rows."""
        rows = await asyncio.to_thread(service.runs.rows, run, after, min(max(most, 1), 5000))
        finite = [{k: v for k, v in r.items() if not isinstance(v, float) or math.isfinite(v)} for r in rows]
        return {"object": "list", "data": finite}

    @api.get("/v1/diptych/runs/sample")
    async def sheet(run: str, file: str) -> Response:
        """A sheet of samples."""
        return Response(await asyncio.to_thread(service.runs.sheet, run, file), media_type="image/png")

    @api.get("/health")
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok", "version": __version__}

    @api.get("/ready")
    async def ready() -> Response:
        """200 while requests are taken, else 503."""
        well = all(w.ready for w in service.workers.values())
        waiting = {name: w.waiting for name, w in service.workers.items()}
        return JSONResponse({"ready": well, "waiting": waiting}, 200 if well else 503)

    @api.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @api.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response((STATIC / "index.html").read_bytes(), media_type="text/html; charset=utf-8")

    @api.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in FILES:
            raise NotFound(f"no file {name[:60]!r}")
        return Response((STATIC / name).read_bytes(), media_type=f"{FILES[name]}; charset=utf-8")

    guard = Guard(api, Keys(options.keys), Rates(options.rate), options.limits, service.metrics, options.quiet)
    guard.service = service  # type: ignore[attr-defined]
    return guard


def _is_form(request: Request) -> None:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ValueError("content-type must be multipart/form-data")


def _about(message: str) -> str | None:
    """The parameter that an error's message begins with, if it does."""
    word = message.split(" ")[0].rstrip(":,")
    known = {*ChatRequest.model_fields, *EditsRequest.model_fields, "image", "mask", "file", "purpose"}
    return word if re.split(r"[.\[]", word)[0] in known else None


def _message(error: Any) -> str:
    return error["msg"].removeprefix("Value error, ")


def _explained(error: RequestValidationError | ValidationError) -> dict[str, Any]:
    """A mistake by the name of its parameter; of the kinds that a value might have been, the one it comes closest to.
    What was sent is not repeated."""
    first = max(error.errors(), key=lambda e: len(e["loc"]))
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "str") and "[" not in str(part)]
    param = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        return problem(f"unknown or unsupported parameter {param[:100]!r}", "unknown_parameter", param)  # type: ignore[index]
    message = _message(first)
    return problem(f"{param}: {message}" if param else message, "invalid_value", param or _about(message))


class Server(uvicorn.Server):
    """Uvicorn that drains its workers before it closes connections, and says where it listens."""

    def __init__(self, config: uvicorn.Config, service: Service, announce: Callable[[str], None]) -> None:
        super().__init__(config)
        self.service, self.announce = service, announce

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self.announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list | None = None) -> None:
        await self.service.drain()  # who asks meanwhile is told that the server is ending
        await super().shutdown(sockets)


def make_server(
    engines: Sequence[Engine], options: Options, host: str, port: int, announce: Callable[[str], None]
) -> Server:
    """A server ready to ``run``."""
    app = create_app(engines, options)
    config = uvicorn.Config(
        app, host, port, log_level="warning", access_log=False, proxy_headers=False, server_header=False,
        limit_concurrency=1024, timeout_graceful_shutdown=5,
    )  # fmt: skip
    return Server(config, app.service, announce)  # type: ignore[attr-defined]


def serve(engines: Sequence[Engine], options: Options, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serves until a signal ends it."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    if not options.keys and host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("no API keys: everybody who reaches %s may use this server", host)
    make_server(engines, options, host, port, announce).run()
