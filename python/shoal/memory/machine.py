"""What this machine has: a GPU or not, and how much host memory may be taken."""

from __future__ import annotations

from pathlib import Path

__all__ = ["SIM_BYTES_MAX", "choose_device", "has_nvidia_device", "host_budget_default"]

SIM_BYTES_MAX = 1 << 30
"""The most that a simulated device has, in bytes, if nothing is said."""

_UNLIMITED = 1 << 60


def choose_device(device: str) -> str:
    """Resolve ``"auto"``; never to a simulation where a real device exists, so that opening that one says why not."""
    if device != "auto":
        return device
    return "cuda:0" if has_nvidia_device() else "sim"


def has_nvidia_device() -> bool:
    """Say whether the machine shows an NVIDIA device, whether or not it can be used."""
    if Path("/proc/driver/nvidia/version").exists() or Path("/usr/lib/wsl/lib/libcuda.so.1").exists():
        return True
    return any(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia[0-9]*"))


def host_budget_default() -> int:
    """Half of the smaller of what is available and what the control groups still allow, in bytes."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    left = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    try:
        allowed = control_group_left(Path("/proc/self/cgroup").read_text(encoding="utf-8"))
    except OSError:
        allowed = None
    if allowed is not None:
        left.append(allowed)
    return min(left, default=SIM_BYTES_MAX) // 2


def control_group_left(membership: str, root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Give how many bytes a process's control group and those above it still allow.

    Cached files that nobody used lately count as free, as the kernel drops them first.

    Parameters
    ----------
    membership
        What ``/proc/self/cgroup`` says.
    root
        Where control groups are mounted, of version 2, or of version 1 below ``memory``.

    Returns
    -------
    int or None
        The least of them; none without a limit.
    """
    least: int | None = None
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_file, usage_file = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_file, usage_file = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = base / path.lstrip("/")
        for group in (own, *own.parents):
            limit = _number(group / limit_file)
            # Version 1 writes "no limit" as a number near 2^63.
            if limit is not None and limit < _UNLIMITED:
                used = max((_number(group / usage_file) or 0) - _cached(group / "memory.stat"), 0)
                left = max(limit - used, 0)
                least = left if least is None else min(least, left)
            if group == base:
                break
    return least


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _cached(statistics: Path) -> int:
    try:
        lines = statistics.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(found.get("total_inactive_file", found.get("inactive_file", 0)))
