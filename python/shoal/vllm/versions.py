"""Which versions of vLLM this package was tested with.

What it hooks into is not vLLM's public interface, so another version is refused, not tried.
"""

from __future__ import annotations

import importlib.metadata
import re
from typing import ClassVar

from shoal.errors import Error

__all__ = ["TESTED", "VersionError", "check_version"]

TESTED = ((0, 26), (0, 27))
"""The first version that was tested, and the first that was not."""


class VersionError(Error):
    """A vLLM that this Shoal was not tested with.

    Attributes
    ----------
    found : str
        Its version.
    """

    _names: ClassVar[tuple[str, ...]] = ("kind", "found")

    found: str | None


def check_version(found: str | None = None) -> str:
    """Refuse a vLLM that was not tested.

    Parameters
    ----------
    found
        A version; that of the installed vLLM, without it.

    Returns
    -------
    str
        The version.

    Raises
    ------
    VersionError
        If it lies outside of :data:`TESTED`, or vLLM is not installed.
    """
    first, end = (".".join(map(str, version)) for version in TESTED)
    if found is None:
        try:
            found = importlib.metadata.version("vllm")
        except importlib.metadata.PackageNotFoundError:
            raise VersionError(
                f"vLLM is not installed; this Shoal was tested with vLLM {first} up to, not including, {end}",
                kind="version", found="none",
            ) from None  # fmt: skip
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if not TESTED[0] <= numbers < TESTED[1]:
        raise VersionError(
            f"vLLM {found}: this Shoal was tested with vLLM {first} up to, not including, {end}; install one of these, "
            "or run vLLM without SHOAL=1, without --worker-cls shoal.vllm.Worker and without shoal.vllm.offloading",
            kind="version", found=found,
        )  # fmt: skip
    return found
