"""Error responses in the form of the route: a sentence at our own, OpenAI's error object below /v1.

In: a path, a status and a sentence. Out: the response. Routes and middlewares answer with it.
"""

from typing import Any

from fastapi.responses import JSONResponse

from serve.api.openai_schemas import OpenaiError, OpenaiErrorBody
from serve.api.schemas import ErrorAnswer

RETRY_AFTER_S = 2
_KINDS = {
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}
_MEANINGS = {
    400: "The body cannot be read, or asks for what cannot be had.",
    401: "An API key is needed, and none or a wrong one was given.",
    404: "There is no such model.",
    413: "The body is too large.",
    421: "The server does not go by the name that was asked for.",
    422: "A field is missing, unknown, of the wrong type or out of range.",
    429: "Too many stories are being written, or too many requests came: try again after `Retry-After` seconds.",
    408: "The body did not arrive in time.",
    500: "The model failed in the middle of the story.",
    503: "The server has no model yet, or is stopping.",
    504: "It took longer than a request may take.",
}


def error_response(
    path: str, status: int, detail: str, headers: dict[str, str] | None = None, *, param: str = "", code: str = ""
) -> JSONResponse:
    """The response; `param` and `code` are OpenAI's and left out elsewhere."""
    content: dict[str, Any] = {"detail": detail}
    if path.startswith("/v1/"):
        content = openai_error(status, detail, param=param, code=code).model_dump()
    return JSONResponse(content, status, headers)


def openai_error(status: int, detail: str, *, param: str = "", code: str = "") -> OpenaiError:
    """OpenAI's error object."""
    kind, usual = _KINDS.get(status, ("server_error" if status >= 500 else "invalid_request_error", ""))
    return OpenaiError(
        error=OpenaiErrorBody(message=detail, type=kind, param=param or None, code=(code or usual) or None)
    )


def error_docs(*statuses: int, is_openai: bool = False) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route, for its OpenAPI description."""
    model = OpenaiError if is_openai else ErrorAnswer
    return {status: {"model": model, "description": _MEANINGS[status]} for status in statuses}


def answer_docs(what: str) -> dict[int | str, dict[str, Any]]:
    """Everything that a route of OpenAI's answers with: `what`, whole or streamed, or an error."""
    whole = {
        "description": f"The {what}; with `stream`, a chunk for each piece, and `[DONE]` at the end.",
        "content": {"text/event-stream": {}},
    }
    return error_docs(400, 401, 404, 408, 413, 429, 500, 503, 504, is_openai=True) | {200: whole}
