"""vLLM's GPU worker with its memory in regions. Imported by vLLM, as ``--worker-cls shoal.vllm.Worker``.

What is overridden is where memory comes from, when it may go, and what sleeping means. Of each of these places
``tests/vllm/test_vllm_contract.py`` says whether it still is where it was.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.gpu import attn_utils
from vllm.v1.worker.utils import select_common_block_size

from shoal.errors import RegionError
from shoal.vllm import packing
from shoal.vllm.memory import EngineMemory, KvWhileAsleep
from shoal.vllm.shelf import STEP_WAIT_S, Shelf
from shoal.vllm.start import StartNeeds
from shoal.vllm.transfers import CONNECTORS, Transfers

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Worker"]

logger = logging.getLogger("vllm.shoal")


class Worker(gpu_worker.Worker):
    """A GPU worker whose weights and CUDA graphs lie in regions, and whose KV cache is elastic.

    Parameters
    ----------
    arguments
        vLLM's own.

    Raises
    ------
    RegionError
        If the engine is set up as this worker cannot run; the message names the setting.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._shelf = Shelf.of_environment()
        with self._telling("beginning"):
            refuse_unsupported(self.vllm_config)
        # The engine plans its cache in this process, once the model is loaded.
        packing.pack(kv_cache_utils, attention_backends, select_common_block_size)
        self._memory: EngineMemory | None = None
        self._is_warm = False
        self._written = 0
        self._needs: StartNeeds | None = None

    # Where memory comes from.

    def init_device(self) -> None:
        """Open the device, with a lease for all that a start needs if a server has a say.

        Graphs are captured into a region.
        """
        with self._telling("opening the device"):
            self._memory = self._open_memory()
            if not self.model_config.enforce_eager:
                # Whoever captures asks the platform for this pool when it is made, which is after this.
                type(current_platform)._global_graph_pool = self._memory.graph_pool()
            super().init_device()

    def _open_memory(self) -> EngineMemory:
        if self._shelf is not None and self._shelf.device == "sim":
            device = "sim"
        else:
            index = current_platform.logical_device_id_to_visible_device_id(self.local_rank)
            device = f"cuda:{index}"
        if self._shelf is None:
            torch.accelerator.set_device_index(index)
            return EngineMemory(device)
        blocks = self._warm_up_blocks([self.cache_config.block_size or 16])
        needs = StartNeeds.of(self.vllm_config, blocks, on_gpu=device != "sim")
        needs.cache(self._shelf.room)
        mem = self._shelf.open(device, needs)
        self._needs = needs
        figures = mem.device_memory()
        needs.tell(self.cache_config, self._shelf.room, figures["total"], figures["free"])
        logger.info(
            "Leased to start: %s; %d bytes of addresses for KV.", needs, self.cache_config.kv_cache_memory_bytes
        )
        return EngineMemory(device, mem)

    def load_model(self, *arguments: Any, **named: Any) -> None:
        """Load the weights into their region.

        Parameters
        ----------
        arguments
            vLLM's.
        """
        with self._telling("loading"):
            super().load_model(*arguments, **named)
            self.memory.place(getattr(self.model_runner, "model", None))

    def determine_available_memory(self) -> int:
        """Profile a step.

        Returns
        -------
        int
            Bytes of the KV cache.
        """
        with self._telling("profiling"):
            self.memory.forget_peak()
            available = super().determine_available_memory()
            if self._shelf is not None:
                self._shelf.profiled(self.memory.beside_regions())
            return available

    def _maybe_get_memory_pool_context(self, tag: str) -> contextlib.AbstractContextManager[Any]:
        if tag == "weights":
            return self.memory.filling_weights()
        # The cache's own tensors come from `_allocate`; what else is made beside them stays when it sleeps.
        return contextlib.nullcontext()

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Make the KV cache, without touching it.

        Parameters
        ----------
        kv_cache_config
            vLLM's.

        Raises
        ------
        RegionError
            If the cache cannot be elastic, or vLLM made its tensors elsewhere.
        """
        if not kv_cache_config.kv_cache_tensors:
            super().initialize_from_config(kv_cache_config)
            return
        from shoal.vllm.pool import install

        with self._telling("making the KV cache"):
            cache = self.memory.make_cache(kv_cache_config)
            sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
            blocks = min(self._warm_up_blocks(sizes), cache.blocks)
            if self._shelf is not None and self._needs is not None:
                self._shelf.lease_kv(self.memory, self._needs, cache.bytes_of(blocks))
            cache.hold(blocks)
            with self._allocating(cache.tensors()) as asked:
                super().initialize_from_config(kv_cache_config)
            if not asked:
                raise RegionError(
                    "vLLM did not ask for its KV cache where it was expected to; nothing of it is elastic",
                    kind="unsupported",
                )
            if self.vllm_config.kv_transfer_config is not None:
                cache.transfers = transfers_of_connector()
            install(cache)
        logger.info(
            "KV cache: %d blocks, %.2f GiB of addresses; memory comes with use.",
            cache.blocks, cache.plan.nbytes / (1 << 30),
        )  # fmt: skip

    def compile_or_warm_up_model(self) -> Any:
        """Warm up and capture graphs; then copy what is in place to the host, in the background.

        Returns
        -------
        CompilationTimes
            vLLM's.
        """
        # Nothing of ours comes or goes while a graph is captured.
        with self._telling("warming up"):
            with self.memory.guard():
                times = super().compile_or_warm_up_model()
            self.memory.synchronize()
            if self.memory.cache is not None:
                self.memory.cache.release()
            self.memory.freeze()
            if self._shelf is not None:
                self._shelf.started(self.memory)
        self._is_warm = True
        return times

    # Steps.

    def execute_model(self, scheduler_output: Any) -> Any:
        """Launch a step, with all memory there.

        Parameters
        ----------
        scheduler_output
            vLLM's.

        Returns
        -------
        ModelRunnerOutput or AsyncModelRunnerOutput or None
            vLLM's.
        """
        cache = self.memory.cache
        if self._is_warm and cache is not None:
            if cache.pool is None:
                raise RegionError("vLLM's scheduler hands out blocks by itself; its KV cache is not elastic")
            if cache.transfers is not None:
                cache.transfers.check()
        if self._shelf is not None and self._is_warm:
            # The scheduler has decided, and nothing of this step has begun.
            self._shelf.errands.run()
        with self.memory.step(STEP_WAIT_S):
            if self._shelf is not None:
                self._shelf.launched(scheduler_output)
            return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Launch the sampling of a step.

        Parameters
        ----------
        grammar_output
            vLLM's.

        Returns
        -------
        ModelRunnerOutput or AsyncModelRunnerOutput
            vLLM's.
        """
        with self.memory.step(STEP_WAIT_S):
            return super().sample_tokens(grammar_output)

    def execute_dummy_batch(self) -> None:
        """Launch a step of nothing, with all memory there."""
        with self.memory.step(STEP_WAIT_S):
            super().execute_dummy_batch()

    def reload_weights(self, *arguments: Any, **named: Any) -> None:
        """Write the weights anew; what has changed is found by its hash when it goes.

        Parameters
        ----------
        arguments
            vLLM's.
        """
        with self._writing():
            super().reload_weights(*arguments, **named)

    def start_weight_update(self) -> None:
        """Begin to write the weights anew, piece by piece."""
        with self.memory.guard():
            super().start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Write some of them.

        Parameters
        ----------
        update_info
            vLLM's.
        """
        with self._writing():
            super().update_weights(update_info)

    def finish_weight_update(self) -> None:
        """All of them are written."""
        with self._writing():
            super().finish_weight_update()

    # Sleep.

    def sleep(self, level: int = 1) -> None:
        """Sleep as vLLM asks for it, by ``LLM.sleep`` or ``/sleep``: it has forgotten cached blocks then.

        Parameters
        ----------
        level
            1 or 2; the same here: weights stay in host memory.
        """
        del level
        self.shoal_sleep("forget")

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Wake as vLLM asks for it.

        Parameters
        ----------
        tags
            Which parts; all come with the first.
        """
        del tags
        self.shoal_wake()

    def shoal_sleep(self, kv: KvWhileAsleep = "keep") -> dict[str, Any]:
        """Give up all memory that lies in regions. No request may be running: :func:`shoal.vllm.suspend` sees to it.

        Parameters
        ----------
        kv
            Whether cached KV blocks are kept in host memory or forgotten.

        Returns
        -------
        dict
            As :meth:`~shoal.vllm.memory.EngineMemory.sleep`.
        """
        self.memory.end_transfers()
        self.memory.synchronize()
        report = self.memory.sleep(kv)
        logger.info("Asleep in %.3f s: %s", report["seconds"], report)
        return report

    def shoal_wake(self) -> dict[str, Any]:
        """Bring everything back.

        Returns
        -------
        dict
            As :meth:`~shoal.vllm.memory.EngineMemory.wake`.
        """
        report = self.memory.wake()
        logger.info("Awake in %.3f s: %s", report["seconds"], report)
        return report

    def shoal_usage(self) -> dict[str, Any]:
        """Give figures.

        Returns
        -------
        dict
            As :meth:`~shoal.vllm.memory.EngineMemory.usage`.
        """
        return self.memory.usage()

    def shoal_kv_limit(self, nbytes: int) -> None:
        """Set the most memory that the KV cache may have. Requests that find no room wait, or are preempted.

        Parameters
        ----------
        nbytes
            How many bytes.
        """
        if self.memory.cache is not None:
            self.memory.cache.set_limit(nbytes)

    def shoal_kv_shrink(self, nbytes: int) -> int:
        """Take memory from the KV cache in which no running request has a block.

        Parameters
        ----------
        nbytes
            How many bytes.

        Returns
        -------
        int
            How many went.
        """
        return 0 if self.memory.cache is None else self.memory.cache.shrink(nbytes)

    def shoal_ready(self, capabilities: dict[str, Any]) -> dict[str, Any]:
        """Tell the server that requests are answered.

        Parameters
        ----------
        capabilities
            What the API server knows.

        Returns
        -------
        dict
            As :meth:`~shoal.vllm.shelf.Shelf.ready`.

        Raises
        ------
        RegionError
            There is no server.
        """
        if self._shelf is None:
            raise RegionError("this engine was not started by shoal serve")
        return self._shelf.ready(capabilities)

    def shoal_weights(self) -> tuple[int, int] | None:
        """Say whether weights were away, or are others than before.

        Returns
        -------
        tuple of int or None
            Bytes that have left the device so far, and how often somebody has written them anew; None while not all of
            them are there, and while they are written.
        """
        # vLLM's own word for it, from the first piece to the last.
        is_written = getattr(self, "_weight_update_active", False)
        left = None if is_written else self.memory.weights_left()
        return None if left is None else (left, self._written)

    def shoal_wrong(self, message: str) -> None:
        """Tell the server, if there is one, that this engine is not to be asked any more.

        Parameters
        ----------
        message
            Why.
        """
        if self._shelf is not None:
            self._shelf.client.failed("internal", message)

    # Helpers.

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold weights while somebody writes them: they are others from then on, also where that fails midway."""
        with self.memory.guard():
            try:
                yield
            finally:
                self._written += 1

    def _telling(self, phase: str) -> contextlib.AbstractContextManager[Any]:
        """Give a context whose failures the server hears of, if there is one."""
        return contextlib.nullcontext() if self._shelf is None else self._shelf.telling(phase)

    @property
    def memory(self) -> EngineMemory:
        """The worker's memory, once its device is open."""
        if self._memory is None:
            raise RegionError("the worker's device is not open yet: init_device comes first")
        return self._memory

    def _warm_up_blocks(self, sizes: list[int]) -> int:
        """Say how many of the first blocks warming up may write to, given the tokens of a block of each group."""
        scheduler = self.vllm_config.scheduler_config
        # A prompt of one token more than a decode step takes, then that step.
        short = 2 * (1 + self.vllm_config.num_speculative_tokens) + 1
        blocks = 64
        for size in sizes:
            # Either as many requests as there may be, or all tokens of a step in one.
            blocks += max(scheduler.max_num_seqs * -(-short // size), -(-scheduler.max_num_batched_tokens // size))
        return blocks

    @contextlib.contextmanager
    def _allocating(self, tensors: dict[str, torch.Tensor]) -> Any:
        """Let both of vLLM's model runners take these tensors where they would allocate their own."""
        asked: list[str] = []
        originals = (attn_utils._allocate_kv_cache, getattr(self.model_runner, "_allocate_kv_cache_tensors", None))

        def allocate(*_: Any) -> dict[str, torch.Tensor]:
            asked.append("asked")
            return dict(tensors)

        attn_utils._allocate_kv_cache = allocate
        if originals[1] is not None:
            self.model_runner._allocate_kv_cache_tensors = allocate
        try:
            yield asked
        finally:
            attn_utils._allocate_kv_cache = originals[0]
            if originals[1] is not None:
                del self.model_runner._allocate_kv_cache_tensors


def refuse_unsupported(config: Any) -> None:
    """Refuse what this worker cannot run.

    Parameters
    ----------
    config
        vLLM's ``VllmConfig``.

    Raises
    ------
    RegionError
        Names the setting.
    """
    parallel = config.parallel_config
    reasons = []
    if parallel.world_size > 1:
        reasons.append(f"tensor and pipeline parallel sizes whose product is 1, not {parallel.world_size}")
    if parallel.data_parallel_size > 1:
        reasons.append(f"--data-parallel-size 1, not {parallel.data_parallel_size}")
    if config.model_config.enable_sleep_mode or config.model_config.enable_cumem_allocator:
        reasons.append("neither --enable-sleep-mode nor --enable-cumem-allocator, since Shoal sleeps in their place")
    if config.kv_transfer_config is not None and config.kv_transfer_config.kv_connector not in CONNECTORS:
        reasons.append(
            f"{' or '.join(CONNECTORS)} as kv_connector, whose copies it knows to wait for, not "
            f"{config.kv_transfer_config.kv_connector}"
        )
    if reasons:
        raise RegionError(f"Shoal's vLLM worker needs {'; '.join(reasons)}", kind="unsupported")


def attention_backends(vllm_config: Any, names: list[str]) -> list[Any]:
    """Give the attention backends of some layers.

    Parameters
    ----------
    vllm_config
        vLLM's ``VllmConfig``.
    names
        The layers'.

    Returns
    -------
    list of type
        Their classes, each once.
    """
    layers = (vllm_config.compilation_config.static_forward_context.get(name) for name in names)
    return list({layer.get_attn_backend(): None for layer in layers if layer is not None})


def transfers_of_connector() -> Transfers:
    """Look into the connector that this process has, and into the half that its scheduler is about to make.

    Returns
    -------
    Transfers
        Of both.
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler

    transfers = Transfers()
    transfers.attach_worker(get_kv_transfer_group().connector_worker)
    transfers.listen(OffloadingConnectorScheduler)
    return transfers
