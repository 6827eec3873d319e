"""Request bodies, checked.

What a client asks for is either honoured or refused with a clear 400; nothing is silently ignored. Fields that do not
change an answer (`user`, `metadata`, ...) are accepted. null stands for absent, as with OpenAI.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ApiError
from .sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping

_HARMLESS = frozenset(
    {
        "model",
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "parallel_tool_calls",
    }
)
_COMMON = frozenset(
    {
        "stream", "stream_options", "stop", "max_tokens", "temperature", "top_p", "top_k", "seed", "presence_penalty",
        "frequency_penalty", "logit_bias", "n", "ignore_eos", "logprobs", "cache_salt",
    }
)  # fmt: skip
# Fields that would change the answer, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
}
_PLAIN_TEXT = "its answers are plain text"
_NO_TOOLS = f"{_PLAIN_TEXT} and name no functions to call; leave it out"
_INSTEAD = {
    "tools": _NO_TOOLS,
    "tool_choice": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "response_format": f"{_PLAIN_TEXT}, bound to no form",
    "modalities": _PLAIN_TEXT,
    "audio": _PLAIN_TEXT,
}
_TEXT_ONLY = frozenset({"prompt", "best_of"})
_STOPS_MAX = 16
_CHOICES_MAX = 128
_TOP_MAX_CHAT, _TOP_MAX_TEXT = 20, 5  # as OpenAI's
_BIAS_MAX = 100.0


@dataclass(frozen=True)
class GenerationAsk:
    """What chat and completion requests have in common."""

    model: str
    stream: bool
    include_usage: bool
    stops: tuple[str, ...]
    tokens_max: int | None
    sampling: Sampling
    ignore_eos: bool
    n: int = 1
    cache_salt: str = ""


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model samples when a request does not say."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def generation_ask(body: Mapping[str, Any], model: str, defaults: SamplingDefaults, *, chat: bool) -> GenerationAsk:
    """Read the common fields of `body`.

    Raises
    ------
    ApiError
        A field has the wrong type, is out of range, or asks for what this worker cannot do.
    """
    own = {"messages", "max_completion_tokens", "chat_template_kwargs", "top_logprobs"} if chat else _TEXT_ONLY
    _refuse_unsupported(body, _HARMLESS | _COMMON | own)
    n = integer(body, "n", 1, 1, _CHOICES_MAX)
    if not chat and integer(body, "best_of", n, 1, _CHOICES_MAX) != n:
        raise unsupported("best_of", "answers are not ranked; 'n' gives as many as are made")
    limit = "max_completion_tokens" if chat and body.get("max_completion_tokens") is not None else "max_tokens"
    stream = boolean(body, "stream", False)
    return GenerationAsk(
        model=text(body, "model", model),
        stream=stream,
        include_usage=_include_usage(body, stream),
        stops=_stops(body.get("stop")),
        tokens_max=integer(body, limit, None, 1, 1 << 31),
        sampling=_sampling(body, defaults, _chat_logprobs(body) if chat else _text_logprobs(body)),
        ignore_eos=boolean(body, "ignore_eos", False),
        n=n,
        cache_salt=text(body, "cache_salt", ""),
    )


def _chat_logprobs(body: Mapping[str, Any]) -> int | None:
    count: int = integer(body, "top_logprobs", 0, 0, _TOP_MAX_CHAT)
    if boolean(body, "logprobs", False):
        return count
    if count:
        raise ApiError("'top_logprobs' is only allowed when 'logprobs' is true", param="top_logprobs")
    return None


def _text_logprobs(body: Mapping[str, Any]) -> int | None:
    count: int | None = integer(body, "logprobs", None, 0, _TOP_MAX_TEXT)
    return count


def _refuse_unsupported(body: Mapping[str, Any], known: frozenset[str] | set[str]) -> None:
    for name, value in body.items():
        if value is None or name in known:
            continue
        if name not in _UNSUPPORTED:
            raise ApiError(f"Unrecognized request argument supplied: {name}", param=name, code="unknown_parameter")
        if not any(value == harmless and type(value) is type(harmless) for harmless in _UNSUPPORTED[name]):
            raise unsupported(name, _INSTEAD.get(name))


def unsupported(name: str, instead: str | None) -> ApiError:
    """Refuse a field that this worker understands but cannot honour."""
    message = f"'{name}' is not supported by this model's worker" + (f": {instead}" if instead else "")
    return ApiError(message, param=name, code="unsupported_parameter")


def _include_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise ApiError("'stream_options' is only allowed when 'stream' is true", param="stream_options")
    if not isinstance(options, dict):
        raise wrong_type("stream_options", "an object", options)
    unknown = sorted(set(options) - {"include_usage", "include_obfuscation"})
    if unknown:
        raise ApiError(f"Unrecognized request argument supplied: stream_options.{unknown[0]}", param="stream_options")
    return boolean(options, "include_usage", False)


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise wrong_type("stop", "a string or a list of strings", value)
    if len(stops) > _STOPS_MAX:
        raise ApiError(f"'stop' has {len(stops)} entries, the most is {_STOPS_MAX}", param="stop")
    if not all(stops):
        raise ApiError("'stop' contains an empty string", param="stop")
    return tuple(stops)


def _sampling(body: Mapping[str, Any], defaults: SamplingDefaults, logprobs: int | None) -> Sampling:
    seed = integer(body, "seed", None, -(1 << 63), (1 << 64) - 1)
    return Sampling(
        temperature=number(body, "temperature", defaults.temperature, 0.0, 2.0),
        top_p=number(body, "top_p", defaults.top_p, 0.0, 1.0),
        top_k=max(0, integer(body, "top_k", defaults.top_k, -1, 1 << 31)),
        seed=secrets.randbits(62) if seed is None else seed,
        presence_penalty=number(body, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=number(body, "frequency_penalty", 0.0, -2.0, 2.0),
        logit_bias=_logit_bias(body.get("logit_bias")),
        logprobs=logprobs,
    )


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong_type("logit_bias", "an object of token ids and numbers", value)
    biases = {}
    for key in value:
        if not key.isdecimal():
            raise ApiError(f"'logit_bias' has the key {key!r}, which is not a token id", param="logit_bias")
        biases[int(key)] = number(value, key, 0.0, -_BIAS_MAX, _BIAS_MAX)
    return biases


def token_ids(value: Any, name: str, vocabulary: int) -> list[int]:
    """Read a list of token ids, each within the vocabulary."""
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int):
            raise wrong_type(name, "token ids", token)
        if not 0 <= token < vocabulary:
            raise ApiError(f"'{name}' has the token id {token}; the vocabulary has {vocabulary} tokens", param=name)
    return list(value)


def one_or_many(body: Mapping[str, Any], name: str, vocabulary: int, many_max: int) -> list[str | list[int]]:
    """Read a string, a list of strings, a list of token ids, or a list of those, as a list of prompts."""
    value = body.get(name)
    if value is None:
        raise ApiError(f"'{name}' is missing", param=name, code="missing_required_parameter")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise wrong_type(name, "a string, a list of strings, or token ids", value)
    if not value:
        raise ApiError(f"'{name}' is empty", param=name)
    if isinstance(value[0], int):
        return [token_ids(value, name, vocabulary)]
    if len(value) > many_max:
        raise ApiError(f"'{name}' has {len(value)} entries, the most is {many_max}", param=name)
    prompts: list[str | list[int]] = []
    for entry in value:
        if isinstance(entry, str) and isinstance(value[0], str):
            prompts.append(entry)
        elif isinstance(entry, list) and isinstance(value[0], list):
            prompts.append(token_ids(entry, name, vocabulary))
        else:
            raise wrong_type(name, "entries all of one kind: strings, or lists of token ids", entry)
    return prompts


def number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    """Read a finite number within [low, high]."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(name, "a number", value)
    if not low <= value <= high:
        raise ApiError(f"'{name}' is {value}, it must lie between {low:g} and {high:g}", param=name)
    return float(value)


def integer(body: Mapping[str, Any], name: str, default: Any, low: int, high: int) -> Any:
    """Read a whole number within [low, high], or the default."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, "a whole number", value)
    if not low <= value <= high:
        raise ApiError(f"'{name}' is {value}, it must lie between {low} and {high}", param=name)
    return value


def boolean(body: Mapping[str, Any], name: str, default: bool) -> bool:
    """Read true or false."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong_type(name, "true or false", value)
    return value


def text(body: Mapping[str, Any], name: str, default: str) -> str:
    """Read a string."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    return value


def wrong_type(name: str, right: str, value: Any) -> ApiError:
    """Refuse a field of the wrong type."""
    kind = {"NoneType": "null", "dict": "an object", "list": "a list", "str": "a string", "bool": "a boolean"}
    got = kind.get(type(value).__name__, f"the number {value}")
    return ApiError(f"'{name}' must be {right}, not {got}", param=name, code="invalid_type")
