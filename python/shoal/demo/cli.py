"""The command line of the demo."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from shoal.demo.driver import run
from shoal.demo.prepare import prepare
from shoal.demo.shelf import MODELS, is_prepared
from shoal.sources.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Run one subcommand and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m shoal.demo", description="Shoal's demonstration shelf.")
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare", help="make the demo's models (downloads what is missing)")
    making.add_argument("names", nargs="*", metavar="MODEL", help=f"one of {', '.join(MODELS)}; all by default")
    making.add_argument("--check", action="store_true", help="only tell whether they are ready (exit status 1 if not)")
    running = commands.add_parser("run", help="serve the shelf and work with it")
    running.add_argument("shelf", nargs="?", type=Path, default=Path("examples/shelf.toml"), help="its configuration")
    options = parser.parse_args(arguments)
    if options.command == "run":
        return _run(options.shelf)
    return _prepare(options.names or list(MODELS), check=options.check)


def _run(shelf: Path) -> int:
    missing = [name for name in MODELS if not is_prepared(name)]
    if missing:
        print(f"not prepared: {', '.join(missing)}; run `python -m shoal.demo prepare` first", file=sys.stderr)
        return 1
    if not shelf.is_file():
        print(f"there is no {shelf}", file=sys.stderr)
        return 1
    return run(shelf)


def _prepare(names: Sequence[str], *, check: bool) -> int:
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        print(f"the demo has no model {unknown[0]!r}; it has {', '.join(MODELS)}", file=sys.stderr)
        return 2
    if check:
        missing = [name for name in names if not is_prepared(name)]
        print("ready" if not missing else f"not ready: {', '.join(missing)}")
        return 1 if missing else 0
    try:
        prepare(names)
    except SourceError as error:
        print(f"cannot prepare {error.source}: {error}", file=sys.stderr)
        return 1
    return 0
