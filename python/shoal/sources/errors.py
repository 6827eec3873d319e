"""Why a model's files could not be had, one class per reason.

Every error carries a ``code`` for machines and says in its text what is wrong and what would be right.
"""

from __future__ import annotations

from typing import Any, ClassVar

from shoal.errors import Error


class SourceError(Error):
    """The files of a model could not be made ready.

    Attributes
    ----------
    code : str
        One word for machines: ``model_missing``, ``model_unauthorized``, ``model_unreachable``,
        ``model_corrupt`` or ``model_unsupported``.
    source : str
        What was asked for, as it was written.
    """

    _names: ClassVar[tuple[str, ...]] = ("kind", "source")

    code: ClassVar[str] = "internal"
    source: str

    def __init__(self, source: str, message: str) -> None:
        super().__init__(message, kind=self.code, source=source)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.source, str(self)))


class SourceMissingError(SourceError):
    """No such directory, model, revision, or it is not in the cache while offline."""

    code = "model_missing"


class SourceUnauthorizedError(SourceError):
    """The hub wants a token, or this token may not read the model."""

    code = "model_unauthorized"


class SourceUnreachableError(SourceError):
    """The hub could not be reached, or stopped answering."""

    code = "model_unreachable"


class SourceCorruptError(SourceError):
    """Files are truncated, inconsistent, or not what their hash says."""

    code = "model_corrupt"


class SourceUnsupportedError(SourceError):
    """The files are there, but not in a form that is safe and known here."""

    code = "model_unsupported"
