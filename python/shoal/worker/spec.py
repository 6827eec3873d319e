"""What the server tells a worker about its model.

The server sends one JSON object in its `Welcome`; :meth:`WorkerSpec.from_welcome` turns it into a checked
:class:`WorkerSpec`, so that no other module looks at raw JSON. A key that this version does not know is logged and left
alone: a newer server may say more than an older worker understands.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, fields
from typing import Any

logger = logging.getLogger(__name__)

TIER_LOADS = ("fastest", "always")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class SpecError(ValueError):
    """The specification cannot be used; the message names the key and what would be right."""


@dataclass(frozen=True)
class DiskShare:
    """A model's part of one disk.

    Attributes
    ----------
    path
        A directory of its own.
    bytes
        Most bytes in it.
    write_bytes_per_hour
        Most bytes written to it in an hour; None for no limit.
    """

    path: str
    bytes: int
    write_bytes_per_hour: int | None = None


@dataclass(frozen=True)
class WeightShare:
    """Where weights are kept at rest, those of all models together.

    Attributes
    ----------
    path
        A directory.
    bytes
        Most bytes in it.
    write_bytes_per_hour
        Most bytes written to it in an hour; None for no limit.
    """

    path: str
    bytes: int
    write_bytes_per_hour: int | None = None


@dataclass(frozen=True)
class RemoteShare:
    """What several servers keep KV in together.

    Attributes
    ----------
    address
        Where it is, as :class:`shoal.RemoteTier` takes it.
    key_file
        The key that its objects are believed by.
    login_file
        Who asks; None where nobody has to say so.
    """

    address: str
    key_file: str
    login_file: str | None = None


@dataclass(frozen=True)
class WorkerSpec:
    """One model as a worker shall serve it.

    Attributes
    ----------
    source
        A directory with the model's files, or what ``shoal.sources`` can turn into one.
    revision
        Revision of a hub source.
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: that of the files, but on a GPU bfloat16 for
        causal models whose files are float32.
    context
        Longest prompt plus answer in tokens; None takes what the model was trained for.
    kv_max_bytes
        Address space for the KV cache, in bytes; None takes four contexts, at most 1 GiB.
    threads
        Threads that torch computes with.
    device
        ``"sim"`` or ``"cuda:N"``.
    device_bytes
        The device's budget, which all models share; None where it is not known.
    device_bytes_max
        The most device memory that this model may have, all kinds together; None where only the budget is the limit.
    overhead_bytes
        Device memory that the process takes on a GPU besides weights and KV cache, as leased before it starts; the
        measured figure corrects it upwards.
    block_tokens
        Tokens of one KV block.
    prefix_caching
        Whether KV of a prompt's beginning is used again for prompts that begin alike.
    wake_check
        Whether a token that is known is computed after each wake; vLLM's engines do it.
    host_tier_bytes
        How much of the host budget keeps such KV in memory, for the time after the device forgot it.
    disk
        Where such KV is kept on disk, for the time after the device forgot it.
    disk_key_file
        The key that what is on disk is encrypted with; None where it is not.
    disk_wait_s
        How long a prompt waits for what tiers below the device have of it; other requests go on meanwhile.
    weights
        Where weights are kept at rest, so that the next start reads them from there; None where they are not.
    remote
        Where several servers keep such KV together; None where they do not.
    tier_load
        ``"fastest"``: what is computed faster than it comes from memory or disk, by what was measured, is computed;
        ``"always"``: what is there is loaded.
    tier_idle_s
        How long a conversation's KV stays on the device unused once it is kept below; None as long as there is room.
    batch_tokens_max
        Most tokens of one engine step in which somebody decodes, and four times as many where nobody does; longer
        prompts are computed in pieces.
    requests_max
        Most requests inside the engine at once; one more is refused.
    stall_timeout_s
        How long a request may make no progress for want of memory before it fails.
    body_bytes_max
        Largest request body.
    """

    source: str
    revision: str | None = None
    dtype: str = "auto"
    context: int | None = None
    kv_max_bytes: int | None = None
    threads: int = min(2, os.cpu_count() or 1)
    device: str = "sim"
    device_bytes: int | None = None
    device_bytes_max: int | None = None
    overhead_bytes: int = 832 << 20
    block_tokens: int = 16
    prefix_caching: bool = True
    wake_check: bool = False
    host_tier_bytes: int = 0
    disk: tuple[DiskShare, ...] = ()
    disk_key_file: str | None = None
    disk_wait_s: float = 1.0
    weights: WeightShare | None = None
    remote: RemoteShare | None = None
    tier_load: str = "fastest"
    tier_idle_s: float | None = None
    batch_tokens_max: int = 512
    requests_max: int = 256
    stall_timeout_s: float = 60.0
    body_bytes_max: int = 8 << 20

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise SpecError("source: the directory of the model's files is missing")
        if self.dtype not in DTYPES:
            raise SpecError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.tier_load not in TIER_LOADS:
            raise SpecError(f"tier_load: {self.tier_load!r} is not one of {', '.join(TIER_LOADS)}")
        for name in ("context", "kv_max_bytes", "device_bytes", "device_bytes_max"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SpecError(f"{name}: {value} is less than 1")
        for name in ("overhead_bytes", "host_tier_bytes"):
            if getattr(self, name) < 0:
                raise SpecError(f"{name}: {getattr(self, name)} is negative")
        for name in ("threads", "batch_tokens_max", "requests_max", "body_bytes_max"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name}: {getattr(self, name)} is less than 1")
        if self.block_tokens < 4:
            raise SpecError(f"block_tokens: {self.block_tokens} is less than 4, the least a paged cache accepts")
        for name in ("stall_timeout_s", "disk_wait_s"):
            if getattr(self, name) <= 0:
                raise SpecError(f"{name}: {getattr(self, name)} is not positive")
        if self.tier_idle_s is not None and self.tier_idle_s <= 0:
            raise SpecError(f"tier_idle_s: {self.tier_idle_s} is not positive")

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @classmethod
    def from_welcome(cls, spec: dict[str, Any]) -> WorkerSpec:
        """Check the server's JSON object.

        Raises
        ------
        SpecError
            A value has the wrong type or is out of range.
        """
        if not isinstance(spec, dict):
            raise SpecError(f"the specification is a {type(spec).__name__}, not an object")
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in spec.items():
            if key not in known:
                logger.warning("specification key %r is not known to this worker and has no effect", key)
            elif value is not None:
                values[key] = _checked(key, value)
        if "source" not in values:
            raise SpecError("source: the directory of the model's files is missing")
        return cls(**values)


def _checked(key: str, value: Any) -> Any:
    if key in ("source", "revision", "dtype", "device", "disk_key_file", "tier_load"):
        if not isinstance(value, str):
            raise SpecError(f"{key}: {value!r} is not a string")
        return value
    if key in ("prefix_caching", "wake_check"):
        if not isinstance(value, bool):
            raise SpecError(f"{key}: {value!r} is neither true nor false")
        return value
    if key == "disk":
        return _disk(value)
    if key == "weights":
        return _weights(value)
    if key == "remote":
        return _remote(value)
    if key in ("stall_timeout_s", "disk_wait_s", "tier_idle_s"):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SpecError(f"{key}: {value!r} is not a number of seconds")
        return float(value)
    if key.endswith(("bytes", "bytes_max")):
        return parse_bytes(key, value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise SpecError(f"{key}: {value!r} is not a whole number")
    return value


def _disk(value: Any) -> tuple[DiskShare, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise SpecError(f"disk: {value!r} is not a list of objects")
    shares = []
    for entry in value:
        path, size, writes = entry.get("path"), entry.get("bytes"), entry.get("write_bytes_per_hour")
        if not isinstance(path, str) or not path:
            raise SpecError(f"disk: {entry!r} has no path")
        limit = None if writes is None else parse_bytes("disk.write_bytes_per_hour", writes)
        shares.append(DiskShare(path, parse_bytes("disk.bytes", size), limit))
    return tuple(shares)


def _weights(value: Any) -> WeightShare:
    if not isinstance(value, dict) or not isinstance(value.get("path"), str) or not value["path"]:
        raise SpecError(f"weights: {value!r} names no directory")
    writes = value.get("write_bytes_per_hour")
    limit = None if writes is None else parse_bytes("weights.write_bytes_per_hour", writes)
    return WeightShare(value["path"], parse_bytes("weights.bytes", value.get("bytes")), limit)


def _remote(value: Any) -> RemoteShare:
    if not isinstance(value, dict):
        raise SpecError(f"remote: {value!r} is not an object")
    address, key_file, login_file = (value.get(name) for name in ("address", "key_file", "login_file"))
    if not isinstance(address, str) or not isinstance(key_file, str) or not isinstance(login_file, str | None):
        raise SpecError(f"remote: {value!r} names no address and no file with its key")
    return RemoteShare(address, key_file, login_file)


def parse_bytes(key: str, value: Any) -> int:
    """Read bytes from a number or from text such as ``"64 MiB"``."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]iB|B)?\s*", value)
        if match:
            return int(float(match[1]) * _UNITS[match[2] or ""])
    raise SpecError(f"{key}: {value!r} is not a number of bytes such as 67108864 or '64 MiB'")
