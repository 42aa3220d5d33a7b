"""``/v1/files``: pictures that are uploaded once and referred to by id."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile

from diptych.serving.errors import NotFound
from diptych.serving.forms import FILE_SCHEMA, check_form, form_body
from diptych.serving.pictures import decode, encode
from diptych.serving.service import Service

_PURPOSES = ("vision", "user_data")
_SCHEMA = {
    "type": "object",
    "properties": {"file": FILE_SCHEMA, "purpose": {"type": "string", "enum": ["vision"]}},
}


def router(service: Service) -> APIRouter:
    """The endpoints of ``/v1/files``."""
    routes = APIRouter()

    @routes.post("/v1/files", openapi_extra=form_body(_SCHEMA))
    async def upload(request: Request) -> dict[str, Any]:
        """Keeps a picture for a while; messages refer to it by its id."""
        check_form(request)
        async with request.form(max_files=1, max_fields=2, max_part_size=64 * 1024) as fields:
            if unknown := sorted(fields.keys() - {"file", "purpose"}):
                raise ValueError(f"{unknown[0][:60]} is unknown; an upload has file and purpose")
            if fields.get("purpose", "vision") not in _PURPOSES:
                raise ValueError("purpose must be vision")
            if not isinstance(file := fields.get("file"), UploadFile):
                raise ValueError("file is missing")
            image = await decode(await file.read(), "file", service.limits)
        data = await asyncio.to_thread(encode, image)  # upright, and without its metadata
        key, now = service.store.put(data, "image/png"), int(time.time())
        about = {"id": key, "object": "file", "bytes": len(data), "created_at": now}
        until = now + service.limits.stored_seconds
        return about | {"filename": "picture.png", "purpose": "vision", "status": "processed", "expires_at": until}

    @routes.get("/v1/files/{key}/content")
    async def content(key: str) -> Response:
        """A stored picture; its address cannot be guessed."""
        if (file := service.store.get(key)) is None:
            raise NotFound("no such file, or no longer")
        return Response(file.data, media_type=file.media)

    @routes.delete("/v1/files/{key}")
    async def forget(key: str) -> dict[str, Any]:
        """Forgets an upload."""
        if not service.store.drop(key):
            raise NotFound("no such file, or no longer")
        return {"id": key, "object": "file", "deleted": True}

    return routes
