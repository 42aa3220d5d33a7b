"""The engines that a server offers, their options and capabilities."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL.Image
from fastapi import Request
from pydantic import TypeAdapter, ValidationError

from diptych.core.sample import Image, Message, Sample, Text, assistant, user
from diptych.generation.engine import Engine
from diptych.generation.scheduler import Size
from diptych.models.protocol import UnifiedModel
from diptych.serving.errors import _message
from diptych.serving.metrics import Metrics, log
from diptych.serving.pictures import Store, decode, fetch, from_data_uri
from diptych.serving.runs import Runs
from diptych.serving.schemas import ChatRequest, Limits, TextPart, ToDraw
from diptych.serving.worker import Call, Refused, Worker

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
