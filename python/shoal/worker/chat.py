"""From chat messages to a prompt, by the model's own template."""

from __future__ import annotations

from typing import Any

import jinja2

from .errors import ApiError

_ROLES = ("system", "developer", "user", "assistant", "tool")


def has_template(tokenizer: Any) -> bool:
    """Whether the model can chat."""
    return bool(getattr(tokenizer, "chat_template", None))


def checked_messages(value: Any) -> list[dict[str, Any]]:
    """Messages with plain-text content.

    Raises
    ------
    ApiError
        A message is malformed or has content that is not text.
    """
    if value is None:
        raise ApiError("'messages' is missing", param="messages", code="missing_required_parameter")
    if not isinstance(value, list):
        raise ApiError("'messages' must be a list of messages", param="messages", code="invalid_type")
    if not value:
        raise ApiError("'messages' is empty: at least one message is needed", param="messages")
    return [_checked_message(message, f"messages.{i}") for i, message in enumerate(value)]


def _checked_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(f"'{where}' must be an object with 'role' and 'content'", param=where, code="invalid_type")
    role = message.get("role")
    if role not in _ROLES:
        raise ApiError(f"'{where}.role' is {role!r}; it must be one of {', '.join(_ROLES)}", param=f"{where}.role")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise ApiError(f"'{where}.{name}' is not supported", param=f"{where}.{name}", code="unsupported_parameter")
    checked = {"role": "system" if role == "developer" else role, "content": _content(message.get("content"), where)}
    if isinstance(message.get("name"), str):
        checked["name"] = message["name"]
    return checked


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(f"'{where}.content' must be a string or a list of parts", param=f"{where}.content")
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ApiError(
                f"'{where}.content' has a part of type {kind!r}; this model reads text only",
                param=f"{where}.content",
                code="unsupported_content",
            )
        pieces.append(part["text"])
    return "".join(pieces)


def render(tokenizer: Any, messages: list[dict[str, Any]], extra: dict[str, Any] | None = None) -> list[int]:
    """Token ids of the prompt that asks for the next message of the assistant.

    Raises
    ------
    ApiError
        The model has no template, or its template refuses these messages.
    """
    if not has_template(tokenizer):
        raise ApiError("this model has no chat template; use /v1/completions", code="no_chat_template")
    try:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **(extra or {}))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ApiError(f"the model's chat template refuses these messages: {error}", param="messages") from error
    return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
