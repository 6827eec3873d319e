"""What the environment says to torch_memory_saver, under the same names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CpuBackupBackend", "Settings", "check_backend"]

CpuBackupBackend: TypeAlias = Literal["mmap", "pinned"]
"""Whether host memory of a backup that is not needed any more is kept for the next one, or given back to the system."""

CHUNK_MIB = 256
"""Bytes on their way to or from a file at once, in MiB, if nothing is said."""


@dataclass
class Settings:
    """What holds for the process until something else is said.

    Parameters
    ----------
    init_enable
        Whether everything that the importing thread allocates is pausable.
    init_backup
        The backup of that.
    backend
        The backend of regions that name none.
    retain
        Whether a copy in host memory outlives a resume.
    disk_dir
        Where backups on disk go.
    chunk_bytes
        How many bytes are on their way to or from a file at once.
    """

    init_enable: bool = False
    init_backup: Literal["none", "cpu", "disk"] = "none"
    backend: CpuBackupBackend = "pinned"
    retain: bool = False
    disk_dir: str | None = None
    chunk_bytes: int = CHUNK_MIB << 20

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Settings:
        """Read them from an environment.

        Parameters
        ----------
        environ
            Its variables.

        Returns
        -------
        Settings
            What it says.

        Raises
        ------
        ValueError
            If a variable has a value that it cannot have.
        """
        cpu, disk = (_flag(environ, f"TMS_INIT_ENABLE_{kind}_BACKUP") for kind in ("CPU", "DISK"))
        if cpu and disk:
            raise ValueError("TMS_INIT_ENABLE_CPU_BACKUP and TMS_INIT_ENABLE_DISK_BACKUP exclude one another")
        chunk = environ.get("TMS_DISK_BACKUP_CHUNK_MB") or str(CHUNK_MIB)
        if not chunk.isdigit() or not int(chunk):
            raise ValueError(f"TMS_DISK_BACKUP_CHUNK_MB must be a whole number of MiB above 0, not {chunk!r}")
        return cls(
            init_enable=_flag(environ, "TMS_INIT_ENABLE"),
            init_backup="cpu" if cpu else "disk" if disk else "none",
            backend=check_backend(environ.get("TMS_INIT_CPU_BACKUP_BACKEND") or "pinned"),
            retain=_flag(environ, "TMS_RETAIN_CPU_BACKUP"),
            disk_dir=environ.get("TMS_DISK_BACKUP_DIR") or None,
            chunk_bytes=int(chunk) << 20,
        )


def check_backend(name: str) -> CpuBackupBackend:
    """Check the name of a backend.

    Parameters
    ----------
    name
        The name.

    Returns
    -------
    str
        The same.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if name == "pinned":
        return "pinned"
    if name == "mmap":
        return "mmap"
    raise ValueError(f"a CPU backup's backend is 'pinned' or 'mmap', not {name!r}")


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value in {"", "0", "false", "no", "off"}:
        return False
    if value in {"1", "true", "yes", "on"}:
        return True
    raise ValueError(f"{name} must be 0 or 1, not {value!r}")
