"""What :mod:`shoal.vllm.offloading` takes from vLLM's own KV offloading, looked up in vLLM's source.

As in `test_vllm_contract.py` each failure says which seam moved.
"""

from __future__ import annotations

import ast
import re

import pytest
from tests.vllm.test_vllm_contract import SOURCE, calls, find, module, parameters, text

pytestmark = pytest.mark.skipif(SOURCE is None, reason="no vLLM here; SHOAL_VLLM_SOURCE names its source")

BASE = "v1/kv_offload/base.py"
TIERS = "v1/kv_offload/tiering/base.py"
SPEC = "v1/kv_offload/tiering/spec.py"
MANAGER = "v1/kv_offload/tiering/manager.py"
CONNECTOR = "distributed/kv_transfer/kv_connector/v1/offloading_connector.py"


def abstract(path: str, name: str) -> set[str]:
    return {
        node.name
        for node in find(path, name).body
        if isinstance(node, ast.FunctionDef)
        and any("abstractmethod" in ast.unparse(one) for one in node.decorator_list)
    }


def fields(path: str, name: str) -> list[str]:
    return [ast.unparse(node.target) for node in find(path, name).body if isinstance(node, ast.AnnAssign)]


def test_a_spec_is_found_by_its_module() -> None:
    factory = "v1/kv_offload/factory.py"
    assert "spec_module_path" in text(factory, "OffloadingSpecFactory", "get_spec_cls")
    assert "spec_cls(config)" in text(factory, "OffloadingSpecFactory", "create_spec"), "a spec is made of other things"
    assert "OffloadingSpecFactory.create_spec" in calls(CONNECTOR, "OffloadingConnector", "__init__")
    assert parameters(CONNECTOR, "OffloadingConnector", "__init__")[1:] == ["vllm_config", "role", "kv_cache_config"]


def test_a_spec_is_told_its_engine_and_the_layout() -> None:
    config = "v1/kv_offload/config.py"
    wanted = {"groups", "worker_kv_bytes_per_block", "extra_config", "engine_id", "cache", "parallel"}
    assert wanted <= set(fields(config, "OffloadingConfig")), "an OffloadingConfig has other fields"
    assert {"tp_size", "pp_size", "pcp_size", "dcp_size", "data_parallel_index"} <= set(
        fields(config, "OffloadingParallelConfig")
    )
    assert {"tokens_per_hash", "blocks_per_chunk"} <= set(fields(config, "OffloadingCacheConfig"))
    assert "cpu_bytes_to_use" in text("v1/kv_offload/cpu/spec.py", "CPUOffloadingSpec", "__init__")


def test_a_tier_below_staging_is_asked_for_what_we_have() -> None:
    wanted = {"lookup", "submit_store", "submit_load", "get_finished_jobs", "on_new_request", "drain_jobs"}
    assert abstract(TIERS, "SecondaryTierManager") == wanted, "a secondary tier has to do other things"
    made = parameters(TIERS, "SecondaryTierManager", "__init__")
    assert made == ["self", "offloading_spec", "primary_kv_view", "tier_type"], (
        "a secondary tier is made of other things"
    )
    assert {"job_id", "keys", "block_ids"} <= set(fields(TIERS, "JobMetadata")), "a job has other fields"
    assert fields(TIERS, "JobResult") == ["job_id", "success"], "what is told of a job has other fields"
    factory = "v1/kv_offload/tiering/factory.py"
    assert parameters(factory, "SecondaryTierFactory", "register_tier") == [
        "cls", "tier_type", "module_path", "class_name"
    ]  # fmt: skip
    assert "_registry" in text(factory, "SecondaryTierFactory", "register_tier")


def test_staging_memory_is_rows_and_is_cleaned_up_by_name() -> None:
    region = "v1/kv_offload/cpu/shared_offload_region.py"
    assert "view(self.num_blocks, self._row_stride)" in text(region, "SharedOffloadRegion", "create_kv_memoryview"), (
        "staging memory is not one row for each chunk any more"
    )
    spec = text(SPEC, "TieringOffloadingSpec", "get_manager")
    made, tiers = spec.find("self._scheduler_mmap = "), spec.find("create_secondary_tier")
    assert 0 <= made < tiers, "staging memory is not made before the tiers, under the name we clean up by"
    assert parameters(region, "SharedOffloadRegion", "cleanup") == ["self"]


def test_a_load_that_fails_is_a_miss_and_not_the_end() -> None:
    done = text(MANAGER, "TieringOffloadingManager", "_process_finished_jobs")
    assert "complete_write(job_metadata.keys, job_metadata.req_context, completed_job.success)" in done, (
        "how a failed load ends is decided otherwise"
    )
    lookup = text(MANAGER, "TieringOffloadingManager", "lookup")
    assert lookup.find("self.primary_tier.lookup") < lookup.find("tier.lookup(key"), "staging is not asked first"
    reset = text(MANAGER, "TieringOffloadingManager", "reset_cache")
    assert reset.find("drain_jobs") < reset.find("primary_tier.reset_cache"), "staging is reset under our transfers"
    stop = text(MANAGER, "TieringOffloadingManager", "shutdown")
    assert stop.find("tier.shutdown()") < stop.find("self.primary_tier.shutdown()"), "staging goes before its tiers"


def test_what_is_mended_is_where_it_was() -> None:
    scheduler = "distributed/kv_transfer/kv_connector/v1/offloading/scheduler.py"
    name = "OffloadingConnectorScheduler"
    assert parameters(scheduler, name, "_calc_num_offloadable_tokens") == ["self", "req_status", "num_computed_tokens"]
    stores = text(scheduler, name, "_build_store_jobs")
    assert "self._calc_num_offloadable_tokens(" in stores, "how much of a request is stored is decided elsewhere"
    assert "num_tokens_after_batch = req.num_tokens" in stores, (
        "the slot of a request's last token is not counted any more: shoal.vllm.mends has to go"
    )
    request = text("v1/request.py", "Request")
    assert "num_output_placeholders" in request
    handler = text("v1/kv_offload/cpu/gpu_worker.py", "SingleDirectionOffloadingHandler", "transfer_async")
    assert "self._stream_pool.pop() if self._stream_pool" in handler, "a transfer's stream comes from elsewhere"
    assert "if self.gpu_to_cpu:\n        stream.wait_stream" in handler, (
        "loads may be ordered after steps by now: shoal.vllm.mends has to go"
    )
    assert "self._load_handler" in text("v1/kv_offload/cpu/gpu_worker.py", "CPUOffloadingWorker", "__init__")
    assert parameters(SPEC, "TieringOffloadingSpec", "create_worker") == ["self", "kv_caches"]


def test_what_a_connector_still_reads_is_in_its_books() -> None:
    scheduler = "distributed/kv_transfer/kv_connector/v1/offloading/scheduler.py"
    worker = "distributed/kv_transfer/kv_connector/v1/offloading/worker.py"
    wanted = {"is_store", "non_sliding_window_block_ids", "sliding_window_block_ids"}
    assert wanted <= set(fields(scheduler, "TransferJobStatus")), "a job has other fields"
    assert {"block_ids", "next_stored_chunk_idx"} <= set(fields(scheduler, "RequestGroupState"))
    assert "blocks_per_chunk" in fields(scheduler, "SchedulerOffloadConfig")
    assert {"req", "group_states", "config"} <= set(fields(scheduler, "RequestOffloadState"))
    made = text(scheduler, "OffloadingConnectorScheduler", "__init__")
    assert "self._jobs: dict[int, TransferJobStatus]" in made, "the scheduler keeps its jobs elsewhere"
    assert "self._req_status: dict[ReqId, RequestOffloadState]" in made, "it keeps its requests elsewhere"
    stores = text(scheduler, "OffloadingConnectorScheduler", "_build_store_jobs")
    assert "self._jobs[job_id] = TransferJobStatus(" in stores, "a job is not known as soon as it is made"
    assert "scheduler_output.finished_req_ids" in stores, (
        "what is stored of a request that has ended is decided elsewhere"
    )
    assert "group_state.offload_keys[start_chunk_idx:num_chunks]" in stores, "what was stored is stored again"
    for name in ("update_connector_output", "build_connector_meta"):
        assert parameters(scheduler, "OffloadingConnectorScheduler", name)[0] == "self"
    later = text(worker, "OffloadingConnectorWorker", "prepare_store_kv")
    assert "self._unsubmitted_store_jobs.append((job_id, entry.src_spec, entry.dst_spec))" in later, (
        "copies do not wait for the next step in that list any more"
    )
    assert "self._unsubmitted_store_jobs.clear()" in text(worker, "OffloadingConnectorWorker", "start_kv_transfers")
    handler = text("v1/kv_offload/cpu/gpu_worker.py", "SingleDirectionOffloadingHandler", "__init__")
    assert "self._transfers: deque[Transfer]" in handler, "copies that run are kept elsewhere"
    assert "stream" in fields("v1/kv_offload/cpu/gpu_worker.py", "Transfer")
    assert "self.connector_worker" in text(CONNECTOR, "OffloadingConnector", "__init__")


def test_a_request_is_known_as_ended_before_its_blocks_are_freed() -> None:
    free = text("v1/core/sched/scheduler.py", "Scheduler", "_free_request")
    assert 0 <= free.find("self._connector_finished(request)") < free.find("self._free_blocks(request)"), (
        "blocks go before the connector hears of it"
    )
    worker = text("v1/worker/gpu_worker.py", "Worker", "initialize_from_config")
    assert "ensure_kv_transfer_initialized(" in worker, "the worker's half of a connector is made elsewhere"


def test_a_reset_flushes_copies_from_the_gpu_with_the_next_step_and_no_earlier() -> None:
    scheduler = "distributed/kv_transfer/kv_connector/v1/offloading/scheduler.py"
    reset = text(scheduler, "OffloadingConnectorScheduler", "reset_cache")
    assert "self._current_batch_jobs_to_flush.update(self._jobs.keys())" in reset
    meta = text(scheduler, "OffloadingConnectorScheduler", "build_connector_meta")
    assert meta.find("on_schedule_end") < meta.find("jobs_to_flush=self._current_batch_jobs_to_flush")
    flush = text(TIERS, "SecondaryTierManager", "drain_jobs")
    assert "reset_cache" in flush, "a tier does not learn of a reset by drain_jobs any more"


def test_the_first_hash_is_read_from_the_environment_after_connectors_are_made() -> None:
    assert re.search(r"getenv\('PYTHONHASHSEED'\)", text("v1/core/kv_cache_utils.py", "init_none_hash"))
    made = text("v1/engine/core.py", "EngineCore", "__init__")
    scheduler, seeded = made.find("self.scheduler"), made.find("init_none_hash(")
    assert 0 <= scheduler < seeded, "hashes are seeded before a spec can set PYTHONHASHSEED"


def test_metrics_are_built_from_the_spec_where_they_are_shown() -> None:
    assert "build_prom_metrics" in {
        node.name for node in ast.walk(module(CONNECTOR)) if isinstance(node, ast.FunctionDef)
    }
    assert parameters(CONNECTOR, "OffloadingConnector", "build_prom_metrics")[:2] == ["cls", "vllm_config"]
    assert parameters(SPEC, "TieringOffloadingSpec", "build_metric_definitions") == ["cls", "extra_config"]
    stats = "distributed/kv_transfer/kv_connector/v1/offloading/metrics.py"
    named = parameters(stats, "OffloadingConnectorStats", "increase_counter")[:3]
    assert named == ["self", "counter_name", "counter_increase_value"], "counters are counted otherwise"
