"""What this machine has: a GPU or not, and how much host memory may be taken."""

from __future__ import annotations

from pathlib import Path

__all__ = ["SIM_BYTES_MAX", "choose_device", "has_nvidia_device", "host_budget_default"]

SIM_BYTES_MAX = 1 << 30
"""The most that a simulated device has, in bytes, if nothing is said."""


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
    """Half of the smaller of what is available and what the control group still allows, in bytes."""
    available = None
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limits = [] if available is None else [available]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return min(limits, default=SIM_BYTES_MAX) // 2
