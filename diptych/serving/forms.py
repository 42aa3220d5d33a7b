"""Forms with files, as endpoints and OpenAPI know them."""

from __future__ import annotations

from typing import Any

from fastapi import Request

FILE_SCHEMA = {"type": "string", "format": "binary"}


def form_body(schema: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI entry of an endpoint that takes a form."""
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def check_form(request: Request) -> None:
    """Raises ``ValueError`` for a request that is not a form."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ValueError("content-type must be multipart/form-data")
