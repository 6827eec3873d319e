"""HTTP as a model hub needs it, with the standard library alone.

Why not a client library: a token must never follow a redirect to another host, a body must be resumable at any byte,
and the standard library can do both in a page of code that has no version to keep up with.
"""

from __future__ import annotations

import ipaddress
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

TIMEOUT_S = 30.0
NETWORK_ERRORS = (OSError, HTTPException)
"""What a connection can fail with (`urllib.error.URLError` and time-outs are `OSError`)."""


class _KeepTokenHome(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but carry ``Authorization`` only to the host it was meant for."""

    def redirect_request(  # noqa: PLR0917 - the signature is the standard library's
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.HTTPError(req.full_url, code, "redirect to another scheme", headers, fp)
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and _origin(newurl) != _origin(req.full_url):
            following.remove_header("Authorization")
        return following


_OPENER = urllib.request.build_opener(_KeepTokenHome)


def get(url: str, headers: Mapping[str, str]) -> HTTPResponse:
    """Open ``url``; the caller closes what is returned.

    Raises
    ------
    urllib.error.HTTPError
        The answer was not a success; it is the answer, too.
    OSError, http.client.HTTPException
        No answer came.
    """
    # The scheme was checked when the endpoint was read, and is again at each redirect.
    request = urllib.request.Request(url, headers=dict(headers))  # noqa: S310
    response: HTTPResponse = _OPENER.open(request, timeout=TIMEOUT_S)
    return response


def is_private_channel(url: str) -> bool:
    """Tell whether a secret may be sent to ``url``: TLS, or this very machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https":
        return True
    host = parts.hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port
