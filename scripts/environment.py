"""Make the repository's own `.venv` what requirements/ says, and do nothing where it already is.

torch comes first and by itself, because where it comes from is the one thing people need to change: its build with
CUDA libraries is over 2 GiB, and a machine without a GPU can do with far less. `SHOAL_TORCH_INDEX` names another index
(a URL) or a directory of wheels; without it pip decides, so find-links and indexes that the user configured count.
Its big files are fetched ahead of pip, which starts an interrupted file anew: see python/shoal/sources/wheels.py.

pip downloads and unpacks with one core at most, and the Rust half takes as long again with all there are: so maturin is
installed before anything else, and builds while pip works. `make` then finds compiled what it installs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".environment"
REQUIREMENTS = ROOT / "requirements"
EXTENSION = ROOT / ".shoal" / "stamps" / "extension"
AHEAD = ROOT / ".shoal" / "ahead"


def main() -> int:
    """Bring the environment up to date; the exit status is pip's."""
    end_by_signals()
    parser = argparse.ArgumentParser(description="Set up .venv.")
    parser.add_argument("--force", action="store_true", help="install again even if nothing has changed")
    options = parser.parse_args()
    wanted = fingerprint()
    if not options.force and STAMP.is_file() and STAMP.read_text("utf-8") == wanted:
        return 0
    python = VENV / "bin" / "python"
    try:
        if not python.exists():
            print(f"Creating {VENV.name}", flush=True)
            run(sys.executable, "-m", "venv", "--clear", str(VENV))
        STAMP.unlink(missing_ok=True)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--progress-bar", "on"]
        constraints = ["--constraint", str(REQUIREMENTS / "constraints.txt")]
        torch = [*torch_from(os.environ.get("SHOAL_TORCH_INDEX")), *constraints, "torch"]
        run(*pip, *constraints, "maturin")
        with compiling():
            print("Installing torch", flush=True)
            run(*pip, *ahead(str(python), torch), *torch)
            print("Installing what requirements/dev.txt names", flush=True)
            run(*pip, "--requirement", str(REQUIREMENTS / "dev.txt"))
    except ValueError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"Stopped: {' '.join(map(str, error.cmd))} failed; its message is above.", file=sys.stderr)
        return 1
    STAMP.write_text(wanted, "utf-8")
    return 0


@contextmanager
def compiling() -> Iterator[None]:
    """Compile the Rust half beside what is done inside, where it has not been built yet, and wait for it.

    With the profile and features that `make` has it built with, so that all of it is used. Where it fails, nothing is
    said here: `make` tries again, and prints why. It ends early where what is done inside, or the wait for it, does not
    end well: it is no part of the terminal's own group, so nobody else would end it.
    """
    if EXTENSION.exists():
        yield
        return
    maturin = VENV / "bin" / "maturin"
    command = [str(maturin), "build", "--release", "--locked", "--quiet", "--out", str(AHEAD)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=ROOT, stdin=quiet, stdout=quiet, stderr=quiet, process_group=0) as build:
        try:
            yield
            if build.poll() is None:
                print("Waiting for the Rust half, which has been compiled meanwhile", flush=True)
                build.wait()
        except BaseException:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(build.pid, signal.SIGTERM)
                build.wait(10)
            raise


def end_by_signals() -> None:
    """Have a signal that ends this end what it has started as well, as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def torch_from(place: str | None) -> list[str]:
    """Return the options that make pip take torch from ``place``; ValueError where that is no place."""
    if not place:
        return []
    if "://" not in place and not Path(place).is_dir():
        raise ValueError(f"SHOAL_TORCH_INDEX is {place}, which is neither a folder nor an address")
    return ["--find-links", place] if Path(place).is_dir() else ["--index-url", place]


def ahead(python: str, arguments: list[str]) -> list[str]:
    """Fetch the big files of what is to be installed; return them, for pip prefers an index to a folder."""
    wheels = by_path(ROOT / "python" / "shoal" / "sources" / "wheels.py")
    if wheels.pip_is_old(python):  # it could not say what it would install; where there is none to be had, pip does it
        upgrade = ["-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--upgrade", "pip"]
        subprocess.run([python, *upgrade], check=False, cwd=ROOT, capture_output=True)
    return [str(wheel) for wheel in wheels.fetch_big(wheels.plan(python, arguments), wheels.folder())]


def by_path(path: Path) -> ModuleType:
    """Import a file that needs nothing but the standard library."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fingerprint() -> str:
    """Return what the environment depends on, as one word."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {os.environ.get('SHOAL_TORCH_INDEX', '')}".encode())
    for path in sorted(REQUIREMENTS.glob("*.txt")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(*command: str) -> None:
    """Run a command; raise if it fails."""
    subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
