"""The process of a policy: questions on standard input, plans on standard output, one JSON object a line.

``python -m shoal.policy MODULE:FUNCTION [--path DIRECTORY]``; the server starts it. The first line says that it can be
asked and what its code is (``{"files": [...]}``), or why it cannot (``{"error": ...}``). Then each question
``{"question": N, "now_ms": ..., "state": ...}`` is answered with ``{"question": N, "plan": ...}`` or ``{"question": N,
"error": ...}``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, TextIO

from shoal.policy.actions import Plan
from shoal.policy.state import Shelf
from shoal.worker import parent

if TYPE_CHECKING:
    from collections.abc import Callable

_FILES_MAX = 256


def main(argv: list[str] | None = None) -> int:
    """Answer until nobody asks any more; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m shoal.policy", description=__doc__)
    parser.add_argument("callable", help="package.module:function")
    parser.add_argument("--path", help="a directory to look for the module in, before all others")
    options = parser.parse_args(argv)
    if not parent.end_with_parent():
        return 1
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints is no answer
    if options.path:
        sys.path.insert(0, options.path)
    try:
        policy = _found(options.callable)
    except Exception as error:  # noqa: BLE001 - whatever the module raises is the server's to tell
        _say(answers, json.dumps({"error": _told(error)}))
        return 2
    _say(answers, json.dumps({"files": _files(options.callable.partition(":")[0], options.path)}))
    for asked in sys.stdin:
        question = json.loads(asked)
        answer: dict[str, Any] = {"question": question["question"]}
        try:
            said = policy(Shelf.read(question["state"], question["now_ms"]))
            line = json.dumps(answer | {"plan": Plan.of(said).written()})
        except Exception as error:  # noqa: BLE001 - the server decides without it, and says why
            traceback.print_exc()
            line = json.dumps(answer | {"error": _told(error)})
        _say(answers, line)
    return 0


def _found(name: str) -> Callable[[Shelf], object]:
    module, _, function = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in function.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{name} is a {type(found).__name__}, not a function")
    if inspect.iscoroutinefunction(found):
        raise TypeError(f"{name} is asynchronous; a policy is a plain function")
    return found  # type: ignore[no-any-return]


def _files(module: str, directory: str | None) -> list[str]:
    """Give the files of a policy's own code: of its package, its module first, and of what lies in `directory`."""
    package = module.partition(".")[0]
    beside = os.path.join(os.path.realpath(directory), "") if directory else None  # noqa: PTH118
    found = []
    for name, loaded in sorted(sys.modules.items(), key=lambda item: item[0] != module):
        file = getattr(loaded, "__file__", None)
        if not isinstance(file, str) or not os.path.isfile(file):  # noqa: PTH113
            continue
        is_beside = beside is not None and os.path.realpath(file).startswith(beside) and "site-packages" not in file
        # A name that is no text cannot be said.
        if (is_beside or name.partition(".")[0] == package) and file.isprintable():
            found.append(file)
    return found[:_FILES_MAX]


def _told(error: BaseException) -> str:
    """Give an error in one line, with the place in the policy where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)} line {frames[-1].lineno})" if frames else ""  # noqa: PTH119
    return " ".join(f"{type(error).__name__}: {error}{where}".split())


def _say(answers: TextIO, line: str) -> None:
    answers.write(line + "\n")
    answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        sys.exit(main())
