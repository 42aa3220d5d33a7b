"""The application: OpenAI's endpoints over diptych's engine, and the page.

::

    connection ──▶ guard ──▶ endpoint ──▶ worker of the model: one running batch ──▶ events ──▶ JSON, or server-sent

Any OpenAI client reads the answers. Fields that OpenAI does not have are added: ``parameters`` (those in effect, seeds
and defaults included), pictures as ``image_url`` parts of a chat's answer, previews of a chat's picture.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp

from diptych import __version__
from diptych.serving import chat, errors, files, images, models, runs
from diptych.serving.errors import NotFound
from diptych.serving.guard import Guard, Keys, Rates
from diptych.serving.hosts import HostNames
from diptych.serving.service import Service

STATIC = Path(__file__).parent / "static"
MEDIA = {"app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}


def create_app(service: Service, host: str = "127.0.0.1") -> ASGIApp:
    """The server of these models as an ASGI application, to be reached at the address ``host``."""

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
    errors.install(api)
    for room in (models, chat, images, files, runs):
        api.include_router(room.router(service))
    api.include_router(_probes(service))
    api.include_router(_page())
    options = service.options
    hosts = HostNames(host, options.host_names)
    return Guard(api, hosts, Keys(options.keys), Rates(options.rate), service.metrics, options)


def _probes(service: Service) -> APIRouter:
    """Health, readiness, version and metrics."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """200 while the process answers."""
        return {"status": "ok", "version": __version__}

    @routes.get("/ready")
    async def ready() -> Response:
        """200 while requests are accepted, else 503."""
        accepted = all(w.ready for w in service.workers.values())
        waiting = {name: w.waiting for name, w in service.workers.items()}
        return JSONResponse({"ready": accepted, "waiting": waiting}, 200 if accepted else 503)

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """The version of diptych."""
        return {"version": __version__}

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Measurements in the format of Prometheus."""
        return Response(generate_latest(service.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return routes


def _page() -> APIRouter:
    """The page and its files."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def index() -> Response:
        return Response((STATIC / "index.html").read_bytes(), media_type="text/html; charset=utf-8")

    @routes.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in MEDIA:
            raise NotFound(f"no file {name[:60]!r}")
        return Response((STATIC / name).read_bytes(), media_type=f"{MEDIA[name]}; charset=utf-8")

    return routes
