"""From chat messages to a prompt, by the model's own template."""

from __future__ import annotations

import inspect
from typing import Any

import jinja2

from .errors import ApiError, shown

_ROLES = ("system", "developer", "user", "assistant", "tool")
# What a message may say beside its role and content. The template gets the first kind; unless it makes use of it, the
# message is refused, because an answer that leaves it out would not be what was asked for.
_FOR_THE_TEMPLATE = ("name", "reasoning_content")
_TOOL_CALL = "tool_call_id"  # names another message and says nothing of its own
_REFUSED = "unsupported_parameter"
_UNSUPPORTED = ("tool_calls", "function_call", "audio", "refusal", "annotations")


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
        raise ApiError(f"'{where}.role' is {shown(role)}; it must be one of {', '.join(_ROLES)}", param=f"{where}.role")
    checked = {"role": "system" if role == "developer" else role}
    for name, value in message.items():
        at = f"{where}.{name}"
        if name in ("role", "content") or value is None:
            continue
        if name in _UNSUPPORTED:
            if value:
                raise ApiError(f"'{at}' is not supported: text is all that is read", param=at, code=_REFUSED)
        elif name not in (*_FOR_THE_TEMPLATE, _TOOL_CALL):
            raise ApiError(f"Unrecognized request argument supplied: {at}", param=at, code="unknown_parameter")
        elif not isinstance(value, str):
            raise ApiError(f"'{at}' must be a string", param=at, code="invalid_type")
        else:
            checked[name] = value
    return checked | {"content": _content(message.get("content"), where)}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(f"'{where}.content' must be a string or a list of parts", param=f"{where}.content")
    pieces = []
    for part in content:
        if not isinstance(part, dict):
            raise ApiError(f"'{where}.content' has a part that is no object: {shown(part)}", param=f"{where}.content")
        kind = part.get("type")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ApiError(
                f"'{where}.content' has a part of type {shown(kind)}; this model reads text only",
                param=f"{where}.content",
                code="unsupported_content",
            )
        if other := sorted(set(part) - {"type", "text"}):
            at = f"{where}.content.{other[0]}"
            raise ApiError(f"Unrecognized request argument supplied: {at}", param=at, code="unknown_parameter")
        pieces.append(part["text"])
    return "".join(pieces)


def render(tokenizer: Any, messages: list[dict[str, Any]], extra: dict[str, Any] | None = None) -> list[int]:
    """Token ids of the prompt that asks for the next message of the assistant.

    Raises
    ------
    ApiError
        The model has no template, its template refuses these messages, or it has no use for something that they say.
    """
    if not has_template(tokenizer):
        raise ApiError("this model has no chat template; use /v1/completions", code="no_chat_template")
    own = set(inspect.signature(tokenizer.apply_chat_template).parameters)
    if taken := sorted(own.intersection(extra or {})):
        at = f"chat_template_kwargs.{taken[0]}"
        raise ApiError(f"'{at}' is not for the template, and not for a client to set", param=at, code=_REFUSED)
    prompt = _applied(tokenizer, messages, extra)
    for name in _FOR_THE_TEMPLATE:
        for role in _ROLES:
            said = [index for index, message in enumerate(messages) if name in message and message["role"] == role]
            if said and _applied(tokenizer, _without(messages, name, role), extra) == prompt:
                at = f"messages.{said[0]}.{name}"
                why = f"this model's chat template makes no use of it for {role} messages"
                raise ApiError(f"'{at}' has no effect: {why}", param=at, code=_REFUSED)
    return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def _without(messages: list[dict[str, Any]], name: str, role: str) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in message.items() if key != name or message["role"] != role} for message in messages
    ]


def _applied(tokenizer: Any, messages: list[dict[str, Any]], extra: dict[str, Any] | None) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **(extra or {}))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ApiError(f"the model's chat template refuses these messages: {error}", param="messages") from error
    return text
