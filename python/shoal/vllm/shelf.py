"""An engine's line to ``shoal serve``: leases before memory is taken, word of what it does, memory given up on request.

It lives in the process of vLLM's engine, which holds the memory. To the server that process and the one with the API
server, its parent, are one worker, named by the parent's number. Threads of the library's own carry out the server's
orders without the GIL: they unmap weights between two steps, and copy KV to the host. What they cannot do is done here:
forget cached blocks, which are vLLM's own business, by the engine's own loop (:mod:`shoal.vllm.errands`).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal import BrokerClient, MemoryManager
from shoal.errors import DeadlineError, Error, LeaseError, RegionError
from shoal.vllm.control import CHECK
from shoal.vllm.errands import Errands, listen
from shoal.vllm.prices import Prices
from shoal.worker import parent
from shoal.worker.usage import Counts, Reporter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from shoal.vllm.cache import ElasticCache
    from shoal.vllm.memory import EngineMemory
    from shoal.vllm.start import StartNeeds

__all__ = ["Shelf"]

logger = logging.getLogger("vllm.shoal")

START_WAIT_S = 600.0
"""How long a start waits for others to give memory up."""

GLANCE_S = 2.0
"""How long a start waits with its weights on the device for what it had not foreseen."""

STEP_WAIT_S = 300.0
"""How long a step waits for its memory before the engine fails."""

SHED_WAIT_S = 0.9
"""How long the engine's loop may take until it comes to a reclaim; the library waits as long for the answer."""

CONTEXT_BYTES = 640 << 20
LOOK_S = 0.25
WATCH_S = 1.0
HAND_OVER_LOOKS = 4


class Shelf:
    """The line.

    Parameters
    ----------
    client
        The connection.
    errands
        What the engine's loop does for others.

    Attributes
    ----------
    client : BrokerClient
        The connection.
    errands : Errands
        What the engine's loop does for others.
    """

    def __init__(self, client: BrokerClient, leader: int, errands: Errands | None = None) -> None:
        self.client = client
        self.errands = errands or Errands()
        self.memory: EngineMemory | None = None
        self._prices: Prices | None = None
        self._reporter: Reporter[Any] | None = None
        self._kept_lock = threading.Lock()
        self._leader = leader
        self._tokens = 0
        self._fixed = 0
        self._profiled = 0
        self._is_ready = False

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Shelf | None:
        """Connect, where :mod:`shoal.vllm.serve` has started this process.

        Parameters
        ----------
        environment
            Where it looks.

        Returns
        -------
        Shelf or None
            None where nobody has.

        Raises
        ------
        Error
            The server is not there, or does not want this process.
        RegionError
            The process that started this one is gone.
        """
        said = environment.get("SHOAL_VLLM_LEADER", "")
        if not said.isdecimal():
            return None
        leader = int(said)
        if leader != os.getpid() and not parent.end_with_parent(leader):
            raise RegionError("the process that started this engine is gone", kind="orphaned")
        client = BrokerClient.connect(environment["SHOAL_CONTROL"], environment["SHOAL_MODEL"], pid=leader)
        client.on_disconnect = "end"
        return cls(client, leader)

    @property
    def device(self) -> str:
        """``"sim"`` or ``"cuda"``; which GPU, the environment has said."""
        return str(self.client.welcome["device"]).partition(":")[0]

    @property
    def room(self) -> int:
        """Bytes that the model can have when nobody else has any."""
        most = self.client.welcome["spec"].get("device_bytes_max")
        budget = int(self.client.welcome["spec"].get("device_bytes") or self.client.welcome["device_bytes"])
        return min(budget, int(most)) if most is not None else budget

    @contextlib.contextmanager
    def telling(self, phase: str) -> Iterator[None]:
        """Say what goes on, and what went wrong with it.

        Parameters
        ----------
        phase
            In a word.
        """
        self.client.loading(phase, 0, 0)
        try:
            yield
        except Exception as error:
            is_lasting = getattr(error, "kind", None) in ("unsupported", "layout")
            code = "model_unsupported" if is_lasting else "internal"
            self.client.failed(code, f"{phase}: {error}")
            raise

    # Starting.

    def open(self, device: str, needs: StartNeeds) -> MemoryManager:
        """Open the device once all that a start needs is leased.

        Parameters
        ----------
        device
            ``"cuda:N"`` or ``"sim"``.
        needs
            What it needs.

        Returns
        -------
        MemoryManager
            The process's own.

        Raises
        ------
        LeaseError, DeadlineError
            It cannot be had in time; the message says why.
        """
        on_gpu = device.startswith("cuda")
        directory = Path(self.client.path).parent
        # Two that each have a half of what they need would wait for one another.
        with _one_at_a_time(directory / "start.lock", START_WAIT_S):
            deadline = time.monotonic() + START_WAIT_S

            if on_gpu:
                from shoal.worker.overhead import Overhead

                overhead = Overhead(device, directory)
                mem = overhead.open(lambda: MemoryManager(device, broker=self.client, overhead=CONTEXT_BYTES))
                self._fixed = needs.driver
                mem.set_overhead(needs.overhead, timeout_s=max(deadline - time.monotonic(), 1.0))
            else:
                mem = MemoryManager(device, broker=self.client)
            self._lease(mem, needs.weights, needs.kv, deadline)
        return mem

    def lease_kv(self, memory: EngineMemory, needs: StartNeeds, nbytes: int) -> None:
        """Lease what warming up takes, where it is more than was foreseen.

        An engine that held its weights while it waits could wait for another that starts and waits for these weights.
        So what is not there soon is waited for with empty hands: the weights go to the host, all leases go back, and
        everything is leased anew, one engine at a time.

        Parameters
        ----------
        memory
            The engine's. Its weights are loaded, and nothing runs.
        needs
            What was leased.
        nbytes
            What it takes.

        Raises
        ------
        LeaseError, DeadlineError
            It cannot be had in time.
        Error
            The weights do not come back.
        """
        mem, more = memory.mem, nbytes - needs.kv
        if more <= 0:
            return
        reason = "the KV blocks that warm an engine up"
        try:
            mem.lease_ahead("kv", more, timeout_s=GLANCE_S, reason=reason)
        except (LeaseError, DeadlineError) as error:
            # Whether the server says no or this side's patience ends first is a matter of less than a millisecond.
            logger.info("All leases of this start go back until there is room for all that it needs: %s", error)
        else:
            return
        if not memory.step_back():
            # The host has no room for weights that were changed: then they stay, and whoever else starts has to yield.
            mem.lease_ahead("kv", more, timeout_s=START_WAIT_S, reason=reason)
            return
        mem.give_up_leases()
        with _one_at_a_time(Path(self.client.path).parent / "start.lock", START_WAIT_S):
            self._lease(mem, needs.weights, nbytes, time.monotonic() + START_WAIT_S)
            memory.wake()

    @staticmethod
    def _lease(mem: MemoryManager, weights: int, kv: int, deadline: float) -> None:
        """Lease weights, then KV, until a time of :func:`time.monotonic`."""
        for kind, nbytes, what in (
            ("weights", weights, "the weights of an engine that starts"),
            ("kv", kv, "the KV blocks that warm an engine up"),
        ):
            mem.lease_ahead(kind, nbytes, timeout_s=max(deadline - time.monotonic(), 1.0), reason=what)  # type: ignore[arg-type]

    def profiled(self, activations: int) -> None:
        """Note what a step takes at most beside regions.

        Parameters
        ----------
        activations
            Bytes, as measured.
        """
        self._profiled = activations

    def started(self, memory: EngineMemory) -> None:
        """Give back what the start did not need; from now on memory is given up on request.

        Parameters
        ----------
        memory
            The engine's.
        """
        self.memory = memory
        given = memory.mem.give_up_leases()
        overhead = self.overhead_peak()
        if overhead is not None:
            try:
                memory.mem.set_overhead(overhead)
            except (LeaseError, DeadlineError) as error:
                logger.warning(
                    "The engine takes %d bytes beside its regions, and they are not leased yet: %s", overhead, error
                )
        logger.info("Started: %d leased bytes were not needed; %s bytes beside regions.", given, overhead)
        from vllm.v1.engine.core import EngineCoreProc

        memory.waiting = self.errands.parked
        listen(EngineCoreProc, self.errands, self._begin, self._idle)

    def overhead_peak(self) -> int | None:
        """Give the most device bytes beside the regions so far; None on a simulated device."""
        if not self._fixed:
            return None
        taken = 0 if self.memory is None else self.memory.beside_regions()
        return self._fixed + max(self._profiled, taken)

    def overhead(self) -> int | None:
        """Give the device bytes beside the regions that the process has now; None on a simulated device.

        A step may take as much as :meth:`overhead_peak` without a question, so the server keeps that for it as long as
        there are weights on the device; while the engine sleeps it keeps this.
        """
        if not self._fixed:
            return None
        return self._fixed + (0 if self.memory is None else self.memory.beside_regions_now())

    def _begin(self, engine: Any) -> None:
        """Serve an engine that waits for its first request."""
        scheduler = engine.scheduler
        original = scheduler.update_from_output

        def update_from_output(*arguments: Any, **named: Any) -> Any:
            outputs = original(*arguments, **named)
            for of_client in outputs.values():
                self._tokens += sum(
                    len(one.new_token_ids) for one in of_client.outputs if not one.request_id.startswith(CHECK)
                )
            return outputs

        scheduler.update_from_output = update_from_output
        if self.memory is not None and (cache := self.memory.cache) is not None:
            threading.Thread(target=self._keep, args=(self.memory, cache), name="shoal-kept", daemon=True).start()
            if cache.pool is not None and self.memory.tokens_per_mib:
                self._prices = Prices(
                    cache.pool.free_block_queue, self.memory.tokens_per_mib, is_kept_below=cache.transfers is not None
                )
                self._prices.watch(scheduler)

    def launched(self, scheduler_output: Any) -> None:
        """Say that a step has all of its memory, and begins.

        Parameters
        ----------
        scheduler_output
            vLLM's.
        """
        if self._prices is not None:
            self._prices.launched(scheduler_output)

    def _tell_kept(self, cache: ElasticCache) -> None:
        # Who looked first shall not be the last to tell.
        with self._kept_lock:
            cache.kv.set_kept(cache.kept_bytes())

    def _idle(self) -> None:
        """Say so at once: the server takes an engine to be busy until it hears of it. Called by the engine's loop."""
        cache = None if self.memory is None else self.memory.cache
        if cache is not None:
            with contextlib.suppress(Error):
                self._tell_kept(cache)  # the last request's blocks are only cached now
        if self._reporter is not None:
            self._reporter.hurry()

    def ready(self, capabilities: dict[str, Any]) -> dict[str, Any]:
        """Say that requests are answered.

        Parameters
        ----------
        capabilities
            What the API server knows.

        Returns
        -------
        dict
            ``outlives``: whether this worker waits for another server when this one is killed; and what was said.
        """
        memory = self.memory
        if memory is None:
            raise RegionError("the engine has not started yet")
        said = {**capabilities, "weights_bytes": memory.mem.usage()["weights_total"]}
        said |= {"kv_block_bytes": 0, "kv_bytes_min": 0, "kv_block_tokens": 0}
        if memory.cache is not None:
            unit = memory.cache.kv.groups[0].granule_min
            said |= {
                "kv_block_bytes": memory.cache.plan.nbytes // memory.cache.blocks, "kv_bytes_min": 2 * unit,
                "kv_block_tokens": memory.block_tokens,
            }  # fmt: skip
        if not self._is_ready:
            self._is_ready = True
            self._reporter = Reporter(self._figures, self._report, LOOK_S)
            self._reporter.start()
            threading.Thread(target=self._watch, name="shoal-watch", daemon=True).start()
        self.client.ready(said)
        return {"outlives": self.client.server_wait_s > 0, **said}

    # While it serves.

    def shed(self, memory: EngineMemory, nbytes: int) -> int:
        """Give up what the engine can do without. Called by the engine's loop.

        A busy engine forgets cached blocks, the longest unused first, before it gives up weights that its next step
        needs; so does an idle one of which no more is wanted than these have. If its weights have to go anyhow, they go
        first, which costs nothing but their way back, and cached blocks are copied to the host; only what finds no room
        there is forgotten.

        Parameters
        ----------
        memory
            The engine's.
        nbytes
            How many bytes are wanted.

        Returns
        -------
        int
            How many went.
        """
        cache = memory.cache
        if cache is None:
            return 0
        counts = self._counts()
        empty = cache.kv.usage()["empty"]
        if counts.running or counts.waiting or nbytes <= empty + cache.kept_bytes():
            return cache.shrink(nbytes)
        freed = cache.kv.trim(nbytes).freed if empty else 0
        used = memory.mem.usage()
        beyond = min(nbytes - freed - used["weights_device"], used["kv_device"] - freed)
        if beyond > 0:
            beyond -= memory.host_room()
        return freed + cache.shrink(beyond) if beyond > 0 else freed

    def _keep(self, memory: EngineMemory, cache: ElasticCache) -> None:
        """Answer reclaims, and say what is only cached. A thread's whole work."""
        while True:
            try:
                wanted = cache.kv.next_wanted(LOOK_S)
                if wanted is not None:
                    number, nbytes = wanted
                    freed = 0
                    with contextlib.suppress(TimeoutError, DeadlineError):
                        freed = self.errands.do(lambda nbytes=nbytes: self.shed(memory, nbytes), SHED_WAIT_S)  # type: ignore[misc]
                    cache.kv.answer_wanted(number, freed)
                self._tell_kept(cache)
                memory.release_unused()
            except Exception as error:  # noqa: BLE001 - whoever asks is answered by this thread alone
                logger.warning("Memory was not given up: %s", error)
                time.sleep(LOOK_S)

    def _counts(self) -> Counts:
        engine = self.errands.engine
        if engine is None:
            return Counts()
        running, waiting = engine.scheduler.get_request_counts()
        prices = self._prices
        return Counts(
            running=running, waiting=waiting, tokens_out=self._tokens,
            kv_back_us_per_mib=0 if prices is None else prices.back_us_per_mib,
            kv_found_milli=0 if prices is None else prices.found_milli,
        )  # fmt: skip

    def _figures(self) -> tuple[Counts, tuple[int, int] | None]:
        now, peak = self.overhead(), self.overhead_peak()
        return self._counts(), None if now is None or peak is None else (now, peak)

    def _report(self, figures: tuple[Counts, tuple[int, int] | None]) -> None:
        counts, overhead = figures
        self.client.usage(
            requests_running=counts.running, requests_waiting=counts.waiting, tokens_out=counts.tokens_out,
            kv_back_us_per_mib=counts.kv_back_us_per_mib, kv_found_milli=counts.kv_found_milli, overhead=overhead,
        )  # fmt: skip

    def _hand_over(self) -> None:
        """Leave what steps take to the server, which has heard of it by now: it is others' while the engine sleeps."""
        if self.memory is None or not self._fixed:
            return
        try:
            self.memory.mem.set_overhead(self._fixed)
        except Error as error:
            # Whoever calls has to hear of the server's end all the same.
            logger.warning("What steps take stays leased also while the engine sleeps: %s", error)

    def _watch(self) -> None:
        """End both processes in order when the server says so. A thread's whole work."""
        looks = 0
        while self.client.connected:
            looks += 1
            if looks == HAND_OVER_LOOKS:
                self._hand_over()
            order = self.client.wait_shutdown(WATCH_S)
            if order is not None:
                logger.info("The server says shutdown: %s", order.get("reason") or "it gives no reason")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._leader, signal.SIGTERM)
                return


@contextlib.contextmanager
def _one_at_a_time(path: Path, timeout_s: float) -> Iterator[None]:
    """Keep out the other engines of this server that start; not for ever."""
    deadline = time.monotonic() + timeout_s
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    logger.warning("Another engine takes long to get its memory; both wait for theirs now.")
                    break
                time.sleep(0.05)
        yield
