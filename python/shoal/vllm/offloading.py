"""Shoal's tiers for vLLM's own KV offloading: host memory and disks, verified, found again after a restart.

vLLM imports this by ``spec_module_path`` (or ``kv_connector_module_path``). Its ``TieringOffloadingSpec`` moves KV
between the GPU and page-locked staging memory of its own; what is staged goes on to Shoal's tiers, and comes back from
them: :class:`ShoalTier` is a secondary tier to it. The worker is vLLM's own, with any number of GPUs.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadingCounterMetadata,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from shoal.memory.sizes import parse_size
from shoal.vllm.mends import order_loads, store_only_what_was_written
from shoal.vllm.tiers import STAGING_BYTES, Rows, TierSettings, model_facts
from shoal.vllm.versions import check_version

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["ShoalConnector", "ShoalOffloadingSpec", "ShoalTier"]

logger = logging.getLogger("vllm.shoal")

TYPE = "shoal"
METRICS = {
    "read": "Chunks that Shoal's tiers gave, verified.",
    "missed": "Chunks that Shoal's tiers were asked for and did not give: gone, damaged, or late.",
    "host_written": "Chunks that went to Shoal's host tier.",
    "disk_written": "Chunks that went to Shoal's disks.",
    "declined": "Chunks that were not worth a write.",
    "failed": "Chunks that a tier could not keep.",
    "refused": "Of those that failed, chunks for which too much waited already.",
}
_PREFIX = "vllm:kv_offload_shoal_"
_ENGINES_MAX = 64

# What an engine's blocks depend on, by its id: the worker's half of a connector is told, the scheduler's is not.
_facts_of: dict[str, dict[str, str]] = {}

check_version()


class ShoalTier(SecondaryTierManager):
    """A tier below vLLM's staging memory: ``{"type": "shoal", "host": ..., "disks": [...]}``.

    Parameters
    ----------
    offloading_spec, primary_kv_view, tier_type
        vLLM's.
    given
        The entry's other keys: those of :class:`~shoal.vllm.tiers.TierSettings`.
    """

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, **given: Any) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type)
        unknown = sorted(set(given) - set(TierSettings.KEYS))
        if unknown:
            raise ValueError(f'a tier of type "shoal" has {", ".join(TierSettings.KEYS)}; not {", ".join(unknown)}')
        config = offloading_spec.config
        self._rows = Rows(
            TierSettings.of(given), primary_kv_view, facts(config), replica=config.parallel.data_parallel_index
        )
        self._told: Counter[str] = Counter()
        # With several steps under way the one that carries out a reset has ended when as many were scheduled after it.
        self._steps_at_once = max(2, int(getattr(config.parallel, "pp_size", 1)) + 1)
        self._quiet_steps = 0
        self._later: list[Any] = []

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Give the metrics of this tier.

        Parameters
        ----------
        extra_config
            The tier's entry.

        Returns
        -------
        dict
            vLLM's kind of definitions, by name.
        """
        del extra_config
        return {_PREFIX + name: OffloadingCounterMetadata(documentation=said) for name, said in METRICS.items()}

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        """Say whether a chunk is there.

        Parameters
        ----------
        key, req_context
            vLLM's.

        Returns
        -------
        LookupResult
            At once.
        """
        del req_context
        return LookupResult.HIT if self._rows.has(key) else LookupResult.MISS

    def submit_store(self, job_metadata: Any) -> None:
        """Begin to keep chunks.

        Parameters
        ----------
        job_metadata
            vLLM's.
        """
        self._rows.save(job_metadata.job_id, job_metadata.keys, job_metadata.block_ids)

    def submit_load(self, job_metadata: Any) -> None:
        """Begin to read chunks into staging memory.

        Parameters
        ----------
        job_metadata
            vLLM's.
        """
        if self._quiet_steps:
            self._later.append(job_metadata)
        else:
            self._rows.load(job_metadata.job_id, job_metadata.keys, job_metadata.block_ids)

    def on_schedule_end(self, context: Any) -> None:
        """Begin what waited for the steps after a reset.

        Parameters
        ----------
        context
            vLLM's.
        """
        del context
        if self._quiet_steps:
            self._quiet_steps -= 1
            if not self._quiet_steps:
                self._begin_what_waited()

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Take what has ended.

        Returns
        -------
        iterable of JobResult
            A load with a chunk that did not come is a failure: vLLM forgets its staged chunks, and asks anew.
        """
        return [JobResult(job_id=job, success=is_whole) for job, is_whole in self._rows.finished()]

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        """Say how a request is offloaded: block by block.

        Parameters
        ----------
        req_context
            vLLM's.

        Returns
        -------
        RequestOffloadingContext
            vLLM's default.
        """
        del req_context
        return RequestOffloadingContext()

    def drain_jobs(self) -> None:
        """Wait until nothing of ours touches the staging memory. It is what vLLM's reset calls.

        vLLM's own copies from the GPU may still be on their way then, to rows that count as free: the step after the
        reset ends them. Until that step has ended, nothing is read into rows.
        """
        self._begin_what_waited()
        self._rows.drain()
        # Loads of a step are asked for before its own call of `on_schedule_end`.
        self._quiet_steps = self._steps_at_once + 1

    def _begin_what_waited(self) -> None:
        waited, self._later = self._later, []
        for job in waited:
            self._rows.load(job.job_id, job.keys, job.block_ids)

    def get_stats(self) -> OffloadingConnectorStats | None:
        """Give what was done since the last call.

        Returns
        -------
        OffloadingConnectorStats or None
            Counters.
        """
        now = Counter({name: count for name, count in self._rows.usage().items() if name in METRICS})
        new, self._told = now - self._told, now
        if not new:
            return None
        stats = OffloadingConnectorStats()
        for name, count in new.items():
            stats.increase_counter(_PREFIX + name, count)
        return stats

    def shutdown(self) -> None:
        """Write out what waits, and give directories up."""
        self._rows.close()


class ShoalOffloadingSpec(TieringOffloadingSpec):
    """vLLM's tiering with Shoal's tiers below.

    ``kv_connector_extra_config`` takes vLLM's own keys and those of :class:`~shoal.vllm.tiers.TierSettings`. ``host``
    and ``disks`` stand for an entry of ``secondary_tiers`` with ``"type": "shoal"``, before the others.
    ``cpu_bytes_to_use`` is vLLM's page-locked staging memory, 1 GiB where it is not given; sizes may have units.

    Parameters
    ----------
    config
        vLLM's.
    """

    def __init__(self, config: Any) -> None:
        current = get_current_vllm_config_or_none()
        if current is not None:
            _remember(config.engine_id, current)
        if "PYTHONHASHSEED" not in os.environ:
            # vLLM hashes the first block of every prompt with this, and with a random number where it is not set: then
            # no other engine finds a block by its name. It asks after its connectors are made.
            os.environ["PYTHONHASHSEED"] = "0"
        super().__init__(dataclasses.replace(config, extra_config=_extra(config.extra_config)))

    def create_worker(self, kv_caches: Any) -> Any:
        """Make what copies between GPU and staging memory: vLLM's own, with loads ordered after steps.

        Parameters
        ----------
        kv_caches
            vLLM's.

        Returns
        -------
        CPUOffloadingWorker
            vLLM's.
        """
        worker = super().create_worker(kv_caches)
        order_loads(worker, current_platform.current_stream, current_platform.Stream)
        return worker

    def get_manager(self) -> Any:
        """Give what decides for the scheduler: vLLM's own, with Shoal's tiers opened.

        Returns
        -------
        TieringOffloadingManager
            The same each time.
        """
        store_only_what_was_written(OffloadingConnectorScheduler)
        try:
            return super().get_manager()
        except BaseException:
            # vLLM has made its staging memory before, and leaves it where only a restart of the machine takes it.
            if self._manager is None and self._scheduler_mmap is not None:
                self._scheduler_mmap.cleanup()
            raise

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Give the metrics of all tiers.

        Parameters
        ----------
        extra_config
            The user's.

        Returns
        -------
        dict
            vLLM's kind of definitions, by name.
        """
        return super().build_metric_definitions(_extra(extra_config))


class ShoalConnector(OffloadingConnector):
    """vLLM's ``OffloadingConnector`` with :class:`ShoalOffloadingSpec`, where workers are processes of their own.

    Parameters
    ----------
    vllm_config, role, kv_cache_config
        vLLM's.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        _name_spec(vllm_config)
        _remember(vllm_config.kv_transfer_config.engine_id, vllm_config)
        super().__init__(vllm_config, role, kv_cache_config)

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, *arguments: Any) -> Any:
        """Make what counts are shown by, in the process that shows them.

        Parameters
        ----------
        vllm_config, arguments
            vLLM's.

        Returns
        -------
        KVConnectorPromMetrics
            vLLM's.
        """
        _name_spec(vllm_config)
        return super().build_prom_metrics(vllm_config, *arguments)


def facts(config: Any) -> dict[str, str]:
    """Say what the bytes of a chunk depend on beside the tokens.

    Parameters
    ----------
    config
        vLLM's ``OffloadingConfig``.

    Returns
    -------
    dict
        Model and weights, dtypes, layout, parallelism, and the version that laid them out.

    Raises
    ------
    ValueError
        vLLM did not say what the model's numbers are.
    """
    known = _facts_of.get(config.engine_id)
    if known is None:
        raise ValueError(
            "vLLM tells an offloading spec neither the model's dtype nor its revision where workers are processes of "
            'their own, so chunks of one model could be taken for another\'s; name "kv_connector": '
            f'"ShoalConnector" with "kv_connector_module_path": "{__name__}", which is told'
        )
    parallel = config.parallel
    return {
        **known,
        "groups": ";".join(f"{group.tokens_per_block}:{','.join(group.layer_names)}" for group in config.groups),
        "tokens_per_hash": str(config.cache.tokens_per_hash),
        "blocks_per_chunk": str(config.cache.blocks_per_chunk),
        "block_bytes": str(config.worker_kv_bytes_per_block),
        "parallel": f"{parallel.tp_size},{parallel.pp_size},{parallel.pcp_size},{parallel.dcp_size}",
    }


def _name_spec(vllm_config: Any) -> None:
    """Name our spec where the user named none."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    extra.setdefault("spec_name", "ShoalOffloadingSpec")
    extra.setdefault("spec_module_path", __name__)


def _remember(engine: str, config: Any) -> None:
    """Note what only the whole configuration says."""
    model, cache = config.model_config, config.cache_config
    if len(_facts_of) >= _ENGINES_MAX:
        _facts_of.clear()
    _facts_of[engine] = {
        **model_facts(model.model, model.revision),
        "dtype": str(model.dtype),
        "cache_dtype": str(cache.cache_dtype),
        "quantization": str(model.quantization),
        # A function's has its address in it, and another one each time.
        "overrides": repr(model.hf_overrides) if isinstance(model.hf_overrides, dict) else "function",
        "hash": f"{cache.prefix_caching_hash_algo}:{os.environ.get('PYTHONHASHSEED', '0')}",
        "engine": f"vllm {check_version()}",
        "runner": str(bool(getattr(config, "use_v2_model_runner", False))),
        "attention": repr(getattr(config, "attention_config", None)),
    }


def _extra(given: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the user's settings into vLLM's own."""
    extra = dict(given)
    extra["cpu_bytes_to_use"] = parse_size(extra.get("cpu_bytes_to_use") or STAGING_BYTES)
    ours = {name: extra.pop(name) for name in TierSettings.KEYS if name in extra}
    others = extra.get("secondary_tiers", [])
    if not isinstance(others, list):
        raise ValueError("secondary_tiers must be a list of tiers' settings")  # noqa: TRY004 - a user's setting
    if ours:
        TierSettings.of(ours)
        extra["secondary_tiers"] = [{"type": TYPE, **ours}, *others]
    return extra


if TYPE not in SecondaryTierFactory._registry:
    SecondaryTierFactory.register_tier(TYPE, __name__, "ShoalTier")
