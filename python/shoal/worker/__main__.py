"""One model, served: ``python -m shoal.worker --control SOCKET --model NAME``.

The server starts this, one process for each model. Everything else comes over the control socket: what to load, how
much memory there is, and where to listen. The order of things: connect, load on the CPU, place the weights (no device
yet), listen, say ready; then serve until the server says shutdown or SIGTERM comes. Until its welcome a worker ends
with its server; from then on, when the server is killed, it goes on with what it holds and waits a bounded time for
another one at the same socket.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import parent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shoal import BrokerClient

    from .device import DeviceMemory
    from .loading import LoadedModel, ModelFiles, Progress
    from .serving import Assembled
    from .spec import WorkerSpec
    from .weights import WeightsAtRest

logger = logging.getLogger("shoal.worker")

_GRACE_S = 10.0  # how long running requests may take after SIGTERM
_PARENT_CHECK_S = 1.0
_SLICE_S = 0.1
_TELL_S = 0.5
_INSTALL = "pip install 'shoal[serve]' brings what serving needs"


def main(argv: Sequence[str] | None = None, server: parent.Parent | parent.Lifeline | None = None) -> int:
    """Serve one model; returns the exit status. `server` is who it ends with, its parent by default."""
    server = parent.Parent() if server is None else server
    if not server.end_with_it():
        print("shoal.worker: the server that started this worker is gone", file=sys.stderr)
        return 1
    parser = argparse.ArgumentParser(prog="python -m shoal.worker", description="Serve one model for shoal serve.")
    parser.add_argument("--control", required=True, type=Path, help="the server's control socket")
    parser.add_argument("--model", required=True, help="the model's name in the server's configuration")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    if isinstance(server, parent.Lifeline):
        logger.info("forked from process %d, which has imported what workers need", os.getppid())
    try:
        from shoal import BrokerClient, Error
    except ImportError as error:
        logger.critical("the native half of shoal is missing (%s)", error)
        return 2
    try:
        client = BrokerClient.connect(str(options.control), options.model)
    except Error as error:
        logger.critical("no server at %s: %s", options.control, error)
        return 2
    client.on_disconnect = "exit"
    if client.server_wait_s > 0:
        server.outlive()
        return _serve(client, options.model, None)
    return _serve(client, options.model, server)


def _serve(client: BrokerClient, name: str, server: parent.Parent | parent.Lifeline | None) -> int:
    from .errors import LoadError, described

    try:
        assembled = _assemble(client, name)
    except LoadError as error:
        logger.critical("%s: %s", error.code, error)
        client.failed(error.code, str(error))
        return 1
    except Exception as error:
        logger.exception("the model could not be made ready")
        client.failed("internal", described(error))
        return 1
    return asyncio.run(_run(client, assembled, server))


def _assemble(client: BrokerClient, name: str) -> Assembled:
    """Load, place, and build the engine."""
    from .errors import LoadError
    from .spec import SpecError, WorkerSpec

    try:
        spec = WorkerSpec.from_welcome({"device_bytes": client.welcome["device_bytes"], **client.welcome["spec"]})
    except SpecError as error:
        raise LoadError("model_unsupported", f"the model's configuration cannot be used: {error}") from error
    # Several workers share the cores. Threads that spin while they wait for the next operation take them from the other
    # models: on two cores, three models together ran five times as fast with threads that sleep. Read as torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with nothing_collected():
        require_extras()
        import torch
        import transformers

        from . import hooks, loading
        from .serving import assemble
        from .tiers import facts_of
        from .weights import WeightsAtRest

    torch.set_num_threads(spec.threads)
    transformers.utils.logging.disable_progress_bar()
    try:
        hooks.verify()
    except hooks.HookError as error:
        raise LoadError("engine", f"{error}: {_INSTALL}") from error
    tell = _Telling(client.loading)
    path = _prepared(spec, tell)
    files = loading.inspect(path)
    host_tier = spec.host_tier_bytes if files.kind == "causal" and spec.prefix_caching else 0
    memory = _open(client, spec, client.welcome["host_budget"] - host_tier)
    begun = time.monotonic()
    at_rest = None if spec.weights is None else WeightsAtRest(spec.weights, files, str(loading.dtype_of(files, spec)))
    loaded, weights = _placed(memory, files, spec, tell, at_rest)
    logger.info("model made, its weights placed, in %.1f s", time.monotonic() - begun)
    memory.warm_up(loaded.model.dtype)
    assembled = assemble(name, loaded, memory, spec, weights)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    memory.keep_below(
        host_tier,
        spec.disk,
        # Others that share a remote have files of other times.
        lambda: facts_of(files, spec.device, dtype, by_content=spec.remote is not None),
        spec.disk_wait_s,
        chooses=spec.tier_load == "fastest",
        idle_s=spec.tier_idle_s,
        key_file=spec.disk_key_file,
        remote=spec.remote,
    )
    return assembled


@contextmanager
def nothing_collected() -> Iterator[None]:
    """While inside, Python looks for no garbage, and never again in what is there at the end: for imports.

    Two thousand modules are a third of a million objects that stay. To walk them again and again while they come is 0.4
    of 5.7 seconds of a processor, and one full collection in the middle of an answer would hold it up for 0.2 s.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _placed(
    memory: DeviceMemory, files: ModelFiles, spec: WorkerSpec, tell: Progress, at_rest: WeightsAtRest | None
) -> tuple[LoadedModel, int]:
    """Make the model, and place its weights: those that are at rest if they can be used, else those of its files."""
    from shoal import TierError

    from . import loading
    from .errors import LoadError, described

    def place(loaded: LoadedModel) -> tuple[LoadedModel, int]:
        return loaded, memory.place(loaded.model, files.path, lambda done, total: tell("placing", done, total), at_rest)

    if at_rest is not None and at_rest.find():
        try:
            return place(loading.load(files, spec, tell, is_blank=True))
        except Exception as error:  # whatever it is, the files decide whether the model can be served
            is_known = isinstance(error, TierError | LoadError)
            logger.warning("the weights at rest are not used: %s", described(error), exc_info=not is_known)
            at_rest.forget(error)
    return place(loading.load(files, spec, tell))


class _Telling:
    """Tells progress to people: each phase's begin and end, and a few times a second what is between."""

    def __init__(self, tell: Progress) -> None:
        self._tell = tell
        self._phase = ""
        self._told = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self._phase or done >= total or now - self._told >= _TELL_S:
            self._phase, self._told = phase, now
            self._tell(phase, done, total)


def _open(client: BrokerClient, spec: WorkerSpec, host_budget: int) -> DeviceMemory:
    """Open the device, with a lease for what this process takes of it before anything is taken.

    `host_budget` is what copies may use of the host: what the server gave less the host tier (I1).
    """
    from shoal import DeviceError, Error, MemoryManager

    from .device import DeviceMemory
    from .errors import LoadError
    from .overhead import Overhead

    if not spec.on_gpu:
        return DeviceMemory(MemoryManager(broker=client, host_budget=host_budget))
    overhead = Overhead(spec.device, Path(client.path).parent, spec.overhead_bytes)
    try:
        mem = overhead.open(lambda: MemoryManager(broker=client, host_budget=host_budget, overhead=spec.overhead_bytes))
    except DeviceError as error:
        raise LoadError("device", str(error)) from error
    except Error as error:
        raise LoadError("internal", f"no room for this worker's own memory on {spec.device}: {error}") from error
    except (RuntimeError, AssertionError) as error:  # torch's, also where it was built without CUDA
        raise LoadError("device", f"torch cannot use {spec.device}: {error}") from error
    return DeviceMemory(mem, overhead)


def require_extras() -> None:
    """Import what the `serve` extra brings; what is not there will not be there after a restart either."""
    from .errors import LoadError

    for module in ("torch", "transformers", "safetensors", "aiohttp", "jinja2"):
        try:
            __import__(module)
        except ModuleNotFoundError as error:
            missing = error.name or module
            needed = "" if missing.partition(".")[0] == module else f", which {module} needs,"
            message = f"the Python package {missing}{needed} is not installed for {sys.executable}: {_INSTALL}"
            raise LoadError("engine", message) from error
        except ImportError as error:
            message = f"the Python package {module} of {sys.executable} cannot be imported ({error}): {_INSTALL}"
            raise LoadError("engine", message) from error


def _prepared(spec: WorkerSpec, progress: Progress) -> Path:
    """Make the source a local directory."""
    from shoal.sources import SourceError, resolve

    from .errors import LoadError

    try:
        return resolve(spec.source, spec.revision, progress)
    except SourceError as error:
        raise LoadError(getattr(error, "code", None) or "model_missing", str(error)) from error


async def _run(client: BrokerClient, assembled: Assembled, server: parent.Parent | parent.Lifeline | None) -> int:
    """Serve until there is a reason to end."""
    from .http import make_app, serve
    from .usage import Counts, Reporter

    def read() -> tuple[Counts, list[dict[str, Any]], dict[str, Any] | None, int | None]:
        memory = assembled.memory
        return assembled.engine.counts(), memory.tiers(), memory.weights_at_rest(), memory.overhead()

    def report(figures: tuple[Counts, list[dict[str, Any]], dict[str, Any] | None, int | None]) -> None:
        counts, tiers, at_rest, overhead = figures
        client.usage(
            requests_running=counts.running,
            requests_waiting=counts.waiting,
            tokens_out=counts.tokens_out,
            tokens_embedded=counts.tokens_embedded,
            kv_back_us_per_mib=counts.kv_back_us_per_mib,
            kv_found_milli=counts.kv_found_milli,
            overhead=None if overhead is None else (overhead, 0),  # what steps take again they lease before
            tiers=tiers,
            weights_at_rest=at_rest,
        )

    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    client.on_disconnect = "end"  # in order: sockets are removed, the engine stops
    assembled.engine.start()
    runner = await serve(make_app(assembled.served), Path(client.welcome["data_socket"]))
    reporter = Reporter(read, report)
    assembled.engine.on_idle = reporter.hurry  # what was told while a request ran would have the model taken to be busy
    reporter.start()
    if assembled.memory.steps_in_order:
        client.set_steps_in_order()
    client.ready(assembled.capabilities)
    assembled.memory.store_weights()
    logger.info("ready: %s", _in_words(assembled.capabilities))
    heard = threading.Event()
    watch = asyncio.create_task(_watch(client, assembled, ending, heard, server))
    await ending.wait()
    watch.cancel()
    heard.set()
    grace_s = _grace(watch)
    logger.info("ending: running requests have %g s", grace_s)
    for site in list(runner.sites):
        await site.stop()  # no new connections; the open ones go on
    deadline = loop.time() + grace_s
    while not assembled.engine.counts().is_idle:
        if loop.time() > deadline:
            logger.warning("ending with requests still running")
            break
        await asyncio.sleep(0.05)
    status = 0 if assembled.engine.alive else 1
    await asyncio.to_thread(assembled.engine.stop)
    await asyncio.to_thread(assembled.memory.close)
    await runner.cleanup()
    await asyncio.to_thread(Path(client.welcome["data_socket"]).unlink, missing_ok=True)
    await asyncio.to_thread(reporter.stop)
    return status


def _next_word(client: BrokerClient, heard: threading.Event) -> dict[str, Any] | None:
    """Wait for the server's word, for `_PARENT_CHECK_S` at most, or until somebody else says that it is over.

    In slices, because the end of this process waits for the thread that this runs in.
    """
    for _ in range(round(_PARENT_CHECK_S / _SLICE_S)):
        order: dict[str, Any] | None = client.wait_shutdown(_SLICE_S)
        if order is not None or heard.is_set() or not client.connected:
            return order
    return None


async def _watch(
    client: BrokerClient,
    assembled: Assembled,
    ending: asyncio.Event,
    heard: threading.Event,
    server: parent.Parent | parent.Lifeline | None,
) -> float:
    """Wait for the server's word, its death or the engine's; returns how long running requests may take."""
    while True:
        order = await asyncio.to_thread(_next_word, client, heard)
        if order is not None:
            logger.info("the server says shutdown: %s", order.get("reason") or "it gives no reason")
            ending.set()
            return min(float(order.get("deadline_ms", 0)) / 1000, _GRACE_S)
        if not assembled.engine.alive:
            client.failed("internal", "the engine's thread ended; the log says why")
            ending.set()
            return 0.0
        # Where it outlives the server (None), the socket tells: it closes when no other server came in time.
        if (server is not None and server.is_gone()) or not client.connected:
            logger.warning("the server is gone")
            ending.set()
            return 0.0


def _in_words(capabilities: dict[str, Any]) -> str:
    routes = ", ".join(f"/v1/{route}" for route in capabilities["routes"])
    said = (
        f"answers {routes}; up to {capabilities['context_tokens']} tokens; {capabilities['weights_bytes']} bytes of "
        f"weights in {capabilities['dtype']}"
    )
    if capabilities["kv_block_bytes"]:
        said += f"; KV in blocks of {capabilities['kv_block_tokens']} tokens, {capabilities['kv_block_bytes']} bytes"
    return said


def _grace(watch: asyncio.Task[float]) -> float:
    with suppress(asyncio.CancelledError, asyncio.InvalidStateError):
        return watch.result()
    return _GRACE_S


if __name__ == "__main__":
    sys.exit(main())
