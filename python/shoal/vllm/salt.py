"""The server's salt of a request, brought to the engine: what one key has computed is not found for another.

With ``separate_keys`` the server says a salt of each request in a header of its own (no client can: the gateway drops
it). vLLM takes salts from the bodies of those of its routes that know of them, so the header is kept for the time of a
request (:class:`CacheSalt`, a middleware of vLLM's API server), and added where each request of any route becomes one
of the engine (:func:`mark`): none is forgotten, and bodies pass unchanged. What a client says as ``cache_salt`` counts
within its key.
"""

from __future__ import annotations

import contextvars
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Scope = MutableMapping[str, Any]
    App = Callable[[Scope, Any, Any], Awaitable[None]]

__all__ = ["HEADER", "MIDDLEWARE", "CacheSalt", "mark"]

HEADER = b"x-shoal-cache-salt"
"""As the server's gateway says it; names of headers are in small letters here."""
MIDDLEWARE = "shoal.vllm.salt.CacheSalt"
"""What vLLM's ``--middleware`` is told."""

_salt: contextvars.ContextVar[str | None] = contextvars.ContextVar("shoal_cache_salt", default=None)


class CacheSalt:
    """ASGI middleware that keeps the salt of the request that is being answered.

    Parameters
    ----------
    app
        What answers.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer one request; its tasks find the salt, those of others do not."""
        said = [value.decode("latin-1") for name, value in scope.get("headers", ()) if name == HEADER]
        before = _salt.set(said[0] if said else None)
        try:
            await self.app(scope, receive, send)
        finally:
            _salt.reset(before)


def mark(engine: Any) -> None:
    """Add the salt of the request that is being answered to each request that `engine` is given.

    Parameters
    ----------
    engine
        vLLM's ``AsyncLLM``; all its requests are made by its input processor.
    """
    processor = engine.input_processor
    process = processor.process_inputs

    @functools.wraps(process)
    def process_inputs(*args: Any, **kwargs: Any) -> Any:
        request = process(*args, **kwargs)
        own = _salt.get()
        if own is not None:
            # A salt of the client's own is one within its key's; no name of a key has a zero in it.
            request.cache_salt = f"{own}\0{request.cache_salt or ''}"
        return request

    processor.process_inputs = process_inputs
