"""Errors in OpenAI's shape."""

from __future__ import annotations

import re
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from diptych.serving.schemas import ChatRequest, EditsRequest
from diptych.serving.worker import Refused


def _told(error: Refused) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status == 400 else "server_error"
    return problem(str(error), error.code, kind=kind)


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


def problem(message: str, code: str, param: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    """The body of an error, as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
