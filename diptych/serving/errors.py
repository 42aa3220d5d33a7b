"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from diptych.serving.schemas import ChatRequest, EditsRequest


class Refused(Exception):
    """A request that gets no answer: the HTTP status, a code, and after how many seconds to try again."""

    status, code = 500, "internal_error"

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Wrong(Refused):
    """The model cannot serve this request."""

    status, code = 400, "invalid_value"


class Full(Refused):
    """The model's queue is full."""

    status, code = 429, "queue_full"


class Late(Refused):
    """The request took longer than the server allows."""

    status, code = 504, "timeout"


class Closing(Refused):
    """The server is shutting down."""

    status, code = 503, "shutting_down"


class Failed(Refused):
    """The model failed; the details are in the server's log."""


class Gone(Refused):
    """The client has disconnected; the response is not sent."""

    status, code = 499, "client_closed_request"


class NotFound(ValueError):
    """Something asked for by name does not exist."""


def problem(message: str, code: str, param: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    """The body of an error, as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(error: Refused) -> dict[str, Any]:
    """The body of a refused request."""
    return problem(str(error), error.code, kind="invalid_request_error" if error.status == 400 else "server_error")


def wrong_value(error: ValueError) -> dict[str, Any]:
    """The body of an error about a value, which the message begins with."""
    return problem(str(error), "invalid_value", _named_param(str(error)))


def plain_message(error: ErrorDetails) -> str:
    """The message of one of pydantic's errors."""
    return error["msg"].removeprefix("Value error, ")


def install(api: FastAPI) -> None:
    """Answers every exception of the endpoints, and every address that does not exist, in OpenAI's shape."""

    @api.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return JSONResponse(refusal(error), error.status, headers)

    @api.exception_handler(RequestValidationError)
    async def invalid_request(_: Request, error: RequestValidationError) -> Response:
        return JSONResponse(_explained(error.errors(), error.body), 400)

    @api.exception_handler(ValidationError)
    async def invalid_form(_: Request, error: ValidationError) -> Response:
        return JSONResponse(_explained(error.errors(), None), 400)

    @api.exception_handler(ValueError)
    async def wrong(_: Request, error: ValueError) -> Response:
        if isinstance(error, NotFound):
            return JSONResponse(problem(str(error), "not_found"), 404)
        return JSONResponse(wrong_value(error), 400)

    @api.exception_handler(HTTPException)
    async def unroutable(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return JSONResponse(problem(_no_route(api, request), "not_found"), 404)
        if error.status_code == 405:
            allowed = Headers(error.headers).get("allow", "another method")
            message = f"{request.method} {request.url.path[:100]} does not exist; {allowed} does"
            return JSONResponse(problem(message, "method_not_allowed"), 405, error.headers)
        return JSONResponse(problem(str(error.detail), "invalid_body"), error.status_code, error.headers)

    @api.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        message = "the server failed on this request; its log says why"
        return JSONResponse(problem(message, "internal_error", kind="server_error"), 500)


def _no_route(api: FastAPI, request: Request) -> str:
    known = ", ".join(path for path in sorted(api.openapi()["paths"]) if path.startswith("/v1/"))
    return f"no endpoint {request.method} {request.url.path[:100]}; endpoints: {known}"


def _named_param(message: str) -> str | None:
    """The parameter that an error's message begins with, if it does."""
    word = message.removeprefix("picture ").split(" ")[0].strip("':,")
    known = {*ChatRequest.model_fields, *EditsRequest.model_fields, "image", "mask", "file", "purpose"}
    return word if re.split(r"[.\[]", word)[0] in known else None


def _explained(errors: Sequence[Any], body: Any) -> dict[str, Any]:
    """The mistake that is nested deepest, by the name of its parameter: of the types that a value might have had, the
    one it comes closest to. The values sent are not repeated."""
    first = max(errors, key=lambda e: len(e["loc"]))
    if first["type"] == "json_invalid":
        message = f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        return problem(message, "invalid_json")
    param = _path(first, body) or None
    if param and first["type"] == "extra_forbidden":
        return problem(f"unknown or unsupported parameter {param[:100]!r}", "unknown_parameter", param)
    message = plain_message(first)
    if param is None and first["type"] in ("model_attributes_type", "model_type", "dict_type"):
        message = "the body must be a JSON object"
    return problem(f"{param}: {message}" if param else message, "invalid_value", param or _named_param(message))


def _path(error: ErrorDetails, body: Any) -> str:
    """The location of an error in the body, as keys and indices. Pydantic's locations also hold the tags and types of
    unions; those name nothing in the body and are left out."""
    *above, last = [part for part in error["loc"] if part not in ("body", "query")] or [""]
    keys, value = [], body
    for part in above:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif body is not None:
            continue
        keys.append(str(part))
    names_field = error["type"] in ("missing", "extra_forbidden") or body is None
    if (
        names_field
        or (isinstance(value, dict) and last in value)
        or (isinstance(value, list) and isinstance(last, int))
    ):
        keys.append(str(last))
    return ".".join(keys)
