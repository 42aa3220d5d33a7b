"""``/v1/models``: the models, what each can do, its defaults and the limits of a request."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import PIL.Image
from fastapi import APIRouter

from diptych.core.sample import Image, Sample, assistant, user
from diptych.models.protocol import UnifiedModel
from diptych.serving.service import Service, open_drawing
from diptych.serving.worker import Worker


def router(service: Service) -> APIRouter:
    """The endpoints of ``/v1/models``."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models, what each can do, its defaults and the limits of a request."""
        return {"object": "list", "data": [describe(service, w) for w in service.workers.values()]}

    @routes.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """One model."""
        return describe(service, service.worker(model))

    return routes


def describe(service: Service, worker: Worker) -> dict[str, Any]:
    """The entry of a model."""
    model, options = worker.engine.model, service.options
    height, width = model.canvas(open_drawing())
    longest = worker.engine.sizes.longest
    drawn = min(service.limits.drawn, worker.engine.sizes.pixels or longest * longest)
    bounds = {"drawn": drawn, "slots": options.slots, "queue": options.queue, "timeout_seconds": options.timeout}
    return {
        "id": worker.engine.name,
        "object": "model",
        "created": service.created,
        "owned_by": "diptych",
        "family": model.family,
        "capabilities": capabilities(model),
        "presets": [name for name, preset in model.presets.items() if not preset.config],
        "sizes": worker.engine.sizes.to_json(),
        "parameters": {"size": f"{width}x{height}", **asdict(model.settings)},
        "limits": asdict(service.limits) | bounds,
        "exact_batching": worker.exact,
    }


def capabilities(model: UnifiedModel) -> dict[str, bool]:
    """Whether a model understands, generates and edits pictures: whether it lays out such requests."""
    dot = PIL.Image.new("RGB", (64, 64))
    requests = {
        "understand": Sample("request", (user(Image(dot), "a"), assistant())),
        "generate": open_drawing(),
        "edit": open_drawing(Image(dot, "condition")),
    }
    return {name: _lays_out(model, request) for name, request in requests.items()}


def _lays_out(model: UnifiedModel, request: Sample) -> bool:
    try:
        model.lay_out(request)
    except ValueError:
        return False
    return True
