"""``/v1/diptych/runs``: training runs to watch, read from their folders.

Names of runs and of sheets are looked up in listings; nothing that a client sends is ever joined to a path."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from fastapi import APIRouter, Response

from diptych.serving.service import Service


def router(service: Service) -> APIRouter:
    """The endpoints of ``/v1/diptych/runs``."""
    routes, runs = APIRouter(), service.runs

    @routes.get("/v1/diptych/runs")
    async def list_runs() -> dict[str, Any]:
        """The training runs under the server's ``--runs``."""
        return {"object": "list", "data": [{"id": name} for name in await asyncio.to_thread(runs.all)]}

    @routes.get("/v1/diptych/runs/about")
    async def about(run: str) -> dict[str, Any]:
        """A run's recipe, stages and sheets of samples."""
        return await asyncio.to_thread(runs.about, run)

    @routes.get("/v1/diptych/runs/metrics")
    async def metrics(run: str, after: int = -1, most: int = 500) -> dict[str, Any]:
        """What a run logged of its steps after ``after``, thinned to ``most`` rows."""
        rows = await asyncio.to_thread(runs.rows, run, after, min(max(most, 1), 5000))
        finite = [{k: v for k, v in r.items() if not isinstance(v, float) or math.isfinite(v)} for r in rows]
        return {"object": "list", "data": finite}

    @routes.get("/v1/diptych/runs/sample")
    async def sample(run: str, file: str) -> Response:
        """A sheet of samples."""
        return Response(await asyncio.to_thread(runs.sheet, run, file), media_type="image/png")

    return routes
