"""Errors a worker reports: to the server while loading, to a client while serving."""

from __future__ import annotations

import json
from typing import Any

_SHOWN_MAX = 80


def described(error: BaseException) -> str:
    """Give the kind of an unexpected error and what it says, if it says anything."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def shown(value: Any) -> str:
    """Give a value of a request as its author wrote it: in JSON, not too long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_MAX else text[: _SHOWN_MAX - 3] + "..."


class LoadError(Exception):
    """The model cannot be served.

    Attributes
    ----------
    code
        ``"model_missing"``, ``"model_corrupt"``, ``"model_unsupported"``, ``"host_budget"``, ``"device"``,
        ``"engine"`` (what it takes to serve is not installed) or ``"internal"``, the only one after which the server
        starts the worker again.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ApiError(Exception):
    """An answer that is not 200, in OpenAI's form.

    Attributes
    ----------
    status
        HTTP status.
    kind
        OpenAI's ``error.type``.
    param
        The field of the request at fault, if one is.
    code
        A word for machines.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.param = param
        self.code = code

    def body(self) -> dict[str, object]:
        """Give the JSON body."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}
