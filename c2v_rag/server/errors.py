"""Error responses in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`.

OpenAI's clients show the message of such a response.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A JSON response with this status and message."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    content = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(content, status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Make `app` answer every error in OpenAI's format."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unexpected_error)


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, error.detail, error.headers)


def _validation_error(request: Request, error: Exception) -> JSONResponse:
    """A response with status 422 that names each wrong field and the reason.

    The values are not repeated: they may be long, or not be text.
    """
    assert isinstance(error, RequestValidationError)
    problems = [
        f"{'.'.join(str(part) for part in one['loc'][1:]) or 'body'}: {one['msg'].removeprefix('Value error, ')}"
        for one in error.errors()[:5]
    ]
    return error_response(422, "The request cannot be read. " + "; ".join(problems) + ".")


def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    logger.error("Unexpected error in the server", exc_info=error)
    return error_response(500, "The server failed; its log says why.")
