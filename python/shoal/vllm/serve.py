"""vLLM under ``shoal serve``: ``python -m shoal.vllm.serve --control SOCKET --model NAME -- ARGS``.

The server starts this for a model with ``engine = "vllm"``. It runs vLLM's own API server on the socket that the server
passes requests to; vLLM starts its engine in a process of its own, and that one, which holds the memory, speaks to the
server for both (:mod:`shoal.vllm.shelf`). Here is what comes before and after: the arguments, the word that all is
ready, and the word of what went wrong where no engine could say it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import Error
from shoal.vllm import salt
from shoal.vllm.checks import WakeChecks
from shoal.worker import parent
from shoal.worker.spec import SpecError, WorkerSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger("shoal.vllm")

DRAIN_S = 10
"""How long running requests may take once the engine is to end."""

_INSTALL = "pip install 'shoal[vllm]' brings what vLLM needs"
_LOOK_S = 0.1
_READY_S = 3600.0
_TELL_S = 2.0


class StartError(Exception):
    """The model cannot be served as it is configured; ``code`` is one of the control protocol's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one model.

    Parameters
    ----------
    argv
        Arguments; the process's own, without it.

    Returns
    -------
    int
        The exit status.
    """
    if not parent.end_with_parent():
        sys.stderr.write("shoal.vllm: the server that started this worker is gone\n")
        return 1
    given = list(sys.argv[1:] if argv is None else argv)
    ours, theirs = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(prog="python -m shoal.vllm.serve", description="Serve one model by vLLM.")
    parser.add_argument("--control", required=True, type=Path, help="the server's control socket")
    parser.add_argument("--model", required=True, help="the model's name in the server's configuration")
    options = parser.parse_args(ours)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio_run = prepare(options.control, options.model)
        spec = told()
        args = arguments(options.model, theirs, spec)
        asyncio_run(serve(args, is_checked=spec.wake_check))
    except StartError as error:
        logger.critical("%s: %s", error.code, error)
        tell_failed(options.control, options.model, error.code, str(error))
        return 1
    except KeyboardInterrupt:
        return 0
    except Exception as error:
        logger.exception("vLLM could not be served")
        # What is wrong with a value is wrong at each start. Where an engine runs it has told what it knew.
        code = "model_unsupported" if isinstance(error, ValueError | KeyError | TypeError) else "internal"
        tell_failed(options.control, options.model, code, f"{type(error).__name__}: {error}")
        return 1
    return 0


def prepare(control: Path, model: str) -> Any:
    """Set what the engine's process finds in its environment; refuse what this vLLM cannot be.

    Parameters
    ----------
    control
        The server's socket.
    model
        The model's name there.

    Returns
    -------
    callable
        What runs a coroutine to its end, as vLLM does it.

    Raises
    ------
    StartError
        vLLM is not there, or is another one.
    """
    from shoal.vllm.versions import VersionError, check_version

    os.environ["SHOAL_CONTROL"] = str(control)
    os.environ["SHOAL_MODEL"] = model
    os.environ["SHOAL_VLLM_LEADER"] = str(os.getpid())
    # Our worker is named, so the plugin is not needed, and a user's SHOAL=0 does not matter.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        check_version()
        import vllm.entrypoints.openai.api_server  # noqa: F401 - what it needs is there, or is named
    except VersionError as error:
        raise StartError("engine", f"{error} ({sys.executable})") from error
    except ImportError as error:
        raise StartError("engine", f"vLLM of {sys.executable} cannot be imported ({error}): {_INSTALL}") from error
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run


def told() -> WorkerSpec:
    """Read what the server says of the model.

    Returns
    -------
    WorkerSpec
        It.

    Raises
    ------
    StartError
        It cannot be used.
    """
    try:
        return WorkerSpec.from_welcome(json.loads(os.environ.get("SHOAL_SPEC", "{}")))
    except (SpecError, json.JSONDecodeError) as error:
        raise StartError("model_unsupported", f"the model's configuration cannot be used: {error}") from error


def arguments(model: str, given: Sequence[str], spec: WorkerSpec) -> argparse.Namespace:
    """Make vLLM's arguments of what the server says of the model and what the user gave.

    Parameters
    ----------
    model
        What clients call it.
    given
        The user's own.
    spec
        What the server says of the model.

    Returns
    -------
    argparse.Namespace
        As vLLM's own command line makes it.

    Raises
    ------
    StartError
        They cannot be used; vLLM has printed why.
    """
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    choose_device(spec)
    whole = [*given, *settings(model, spec, source_of(spec), os.environ.get("SHOAL_DATA_SOCKET", ""))]
    parser = make_arg_parser(FlexibleArgumentParser(description="vLLM under shoal serve."))
    try:
        args = parser.parse_args(whole)
        validate_parsed_serve_args(args)
    except SystemExit as error:
        raise StartError(
            "model_unsupported", f"vLLM does not take the model's `args` {list(given)}: its log says why"
        ) from error
    except (TypeError, ValueError, KeyError) as error:
        raise StartError("model_unsupported", f"vLLM does not take the model's `args`: {error}") from error
    if not getattr(args, "shutdown_timeout", DRAIN_S):
        args.shutdown_timeout = DRAIN_S
    return args


def settings(model: str, spec: WorkerSpec, source: str, socket: str) -> list[str]:
    """Give what the server decides, in vLLM's words. It comes last, so it counts.

    Parameters
    ----------
    model
        What clients call it.
    spec
        What the server says of it.
    source
        Its directory.
    socket
        Where to listen.

    Returns
    -------
    list of str
        Arguments.
    """
    said = [
        "--model", source, "--served-model-name", model, "--uds", socket, "--worker-cls", "shoal.vllm.Worker",
        "--distributed-executor-backend", "uni", "--middleware", salt.MIDDLEWARE,
    ]  # fmt: skip
    if spec.context is not None:
        said += ["--max-model-len", str(spec.context)]
    if spec.dtype != "auto":
        said += ["--dtype", spec.dtype]
    if not spec.prefix_caching:
        said.append("--no-enable-prefix-caching")
    return said


def choose_device(spec: WorkerSpec) -> None:
    """Show vLLM the server's GPU alone: it takes the first it sees.

    Parameters
    ----------
    spec
        What the server says.
    """
    kind, _, number = spec.device.partition(":")
    if kind != "cuda":
        return
    ordinal = int(number or 0)
    visible = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[ordinal] if ordinal < len(visible) else str(ordinal)


def source_of(spec: WorkerSpec) -> str:
    """Make the source a local path.

    Parameters
    ----------
    spec
        What the server says.

    Returns
    -------
    str
        A directory, or a file.

    Raises
    ------
    StartError
        It is not there.
    """
    from shoal.sources import SourceError, resolve

    # What lies here is vLLM's to read, in any form that it knows.
    if Path(spec.source).exists():
        return spec.source
    try:
        return str(resolve(spec.source, spec.revision, lambda *_: None))
    except SourceError as error:
        raise StartError(getattr(error, "code", None) or "model_missing", str(error)) from error


async def serve(args: argparse.Namespace, *, is_checked: bool) -> None:
    """Run vLLM's API server until it is to end.

    Parameters
    ----------
    args
        vLLM's.
    is_checked
        Whether a token is compared after each wake.
    """
    from vllm.entrypoints.openai import api_server

    listen_address, sock = api_server.setup_server(args, reuse_port=False)
    async with api_server.build_async_engine_client(args) as engine:
        salt.mark(engine)
        checks = WakeChecks(engine) if is_checked else None
        announcing = asyncio.create_task(announce(engine, args.uds, checks))
        announcing.add_done_callback(_end_unannounced)
        tasks = [announcing] if checks is None else [announcing, asyncio.create_task(watch(engine, announcing, checks))]
        try:
            shutdown = await api_server.build_and_serve(engine, listen_address, sock, args)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    try:
        await shutdown
    finally:
        sock.close()


def _end_unannounced(announcing: asyncio.Task[None]) -> None:
    """End a worker that nobody will ever ask, because it could not say that it is ready."""
    if not announcing.cancelled() and (error := announcing.exception()) is not None:
        logger.critical("the server was not told that requests are answered: %s", error)
        os.kill(os.getpid(), signal.SIGTERM)


async def watch(engine: Any, announcing: asyncio.Task[None], checks: WakeChecks) -> None:
    """Check wakes, once requests are answered. An engine that says something else after one ends at once.

    Parameters
    ----------
    engine
        vLLM's ``AsyncLLM``.
    announcing
        What says that requests are answered.
    checks
        The checks.
    """
    await asyncio.wait([announcing])
    try:
        await checks.run()
    except Error as error:
        logger.critical("%s: this engine answers nobody any more", error)
        # Whoever waits for an answer gets one of the next engine, or hears that there is none; never a wrong one.
        with contextlib.suppress(Exception):
            await asyncio.wait_for(engine.collective_rpc("shoal_wrong", args=(str(error),)), _TELL_S)
        os._exit(1)
    except Exception as error:  # noqa: BLE001 - vLLM itself ends an engine that is dead
        logger.warning("Wakes are not checked any more: %s", error)


async def announce(engine: Any, socket: str, checks: WakeChecks | None = None) -> None:
    """Say that requests are answered, once they are.

    Parameters
    ----------
    engine
        vLLM's ``AsyncLLM``.
    socket
        Where it answers.
    checks
        What is to know first what the engine says.
    """
    for _ in range(int(_READY_S / _LOOK_S)):
        if await _asked(socket, "/health") is not None:
            break
        await asyncio.sleep(_LOOK_S)
    described = await _asked(socket, "/openapi.json")
    paths = json.loads(described).get("paths", {}) if described else {}
    routes = sorted(
        path.removeprefix("/v1/") for path, ways in paths.items() if path.startswith("/v1/") and "post" in ways
    )
    config = engine.model_config
    capabilities = {
        "routes": routes or ["chat/completions", "completions"],
        "context_tokens": int(config.max_model_len),
        "dtype": str(config.dtype).removeprefix("torch."),
    }
    if checks is not None:
        await checks.begin()
    (report,) = await engine.collective_rpc("shoal_ready", args=(capabilities,))
    if report["outlives"]:
        parent.outlive_parent()
    logger.info("ready: %s", report)


async def _asked(socket: str, path: str) -> bytes | None:
    """Get something over the socket; nothing where it is not answered with 200."""
    try:
        reader, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        return None
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: shoal\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        head, _, body = (await asyncio.wait_for(reader.read(-1), 30)).partition(b"\r\n\r\n")
    except (OSError, TimeoutError):
        return None
    finally:
        writer.close()
    return body if head.split(b" ", 2)[1:2] == [b"200"] else None


def tell_failed(control: Path, model: str, code: str, message: str) -> None:
    """Tell the server why there is no engine; nobody hears it where one has greeted.

    Parameters
    ----------
    control
        The server's socket.
    model
        The model's name there.
    code, message
        What is wrong.
    """
    from shoal import BrokerClient, Error

    try:
        client = BrokerClient.connect(str(control), model)
    except Error as error:
        logger.info("the server is not told: %s", error)
        return
    client.failed(code, message)


if __name__ == "__main__":
    sys.exit(main())
