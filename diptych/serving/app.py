"""OpenAI's endpoints over diptych's engine, and the page.

::

    guard ──▶ endpoint ──▶ worker of the model: one running batch ──▶ events ──▶ JSON, or server-sent events

Any OpenAI client reads the answers; what OpenAI has no word for is added beside: ``parameters`` (those in effect, seeds
and defaults included), pictures as ``image_url`` parts of a chat's answer, previews of a chat's picture.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import PIL.Image
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from diptych import __version__
from diptych.generation.engine import Engine
from diptych.serving.chat import Conversation
from diptych.serving.errors import _about, _explained, _told, problem
from diptych.serving.guard import Guard, Keys, Rates
from diptych.serving.images import Gallery, _form
from diptych.serving.metrics import log
from diptych.serving.pictures import decode, encode
from diptych.serving.schemas import ChatRequest, EditsRequest, ImagesRequest
from diptych.serving.service import NotFound, Options, Service
from diptych.serving.stream import EventStream
from diptych.serving.worker import Refused

STATIC = Path(__file__).parent / "static"


FILES = {"app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}


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
