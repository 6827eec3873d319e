"""What this package takes from inside vLLM, looked up in vLLM's source: each failure says which seam moved.

The source is read, not imported. `SHOAL_VLLM_SOURCE` names the folder of a `vllm` package; else an installed vLLM is
read; where there is neither, nothing is tested.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from functools import cache
from pathlib import Path

import pytest

from shoal.vllm import versions


def source() -> Path | None:
    if named := os.environ.get("SHOAL_VLLM_SOURCE"):
        return Path(named)
    spec = importlib.util.find_spec("vllm")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    # A folder of tests may have that name too.
    return next((Path(folder) for folder in folders if (Path(folder) / "v1").is_dir()), None)


SOURCE = source()
pytestmark = pytest.mark.skipif(SOURCE is None, reason="no vLLM here; SHOAL_VLLM_SOURCE names its source")


@cache
def module(path: str) -> ast.Module:
    assert SOURCE is not None
    file = SOURCE / path
    assert file.is_file(), f"vllm/{path} is gone"
    return ast.parse(file.read_text("utf-8"))


def find(path: str, *names: str) -> ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef:
    """Find a class or function by its names from the outside in."""
    here: ast.AST = module(path)
    for at, name in enumerate(names):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [node for node in ast.iter_child_nodes(here) if isinstance(node, kinds) and node.name == name]
        assert found, f"vllm/{path}: there is no {'.'.join(names[: at + 1])} any more"
        here = found[-1]
    return here  # type: ignore[return-value]


def parameters(path: str, *names: str) -> list[str]:
    function = find(path, *names)
    assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
    arguments = function.args
    return [one.arg for one in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]


def text(path: str, *names: str) -> str:
    return ast.unparse(find(path, *names) if names else module(path))


def calls(path: str, *names: str) -> list[str]:
    """Give the names of what a function calls, in order."""
    found = [node for node in ast.walk(find(path, *names)) if isinstance(node, ast.Call)]
    found.sort(key=lambda node: (node.lineno, node.col_offset))
    return [ast.unparse(node.func) for node in found]


WORKER = "v1/worker/gpu_worker.py"
V1_RUNNER = "v1/worker/gpu_model_runner.py"
V2_CACHE = "v1/worker/gpu/attn_utils.py"
POOL = "v1/core/block_pool.py"
COORDINATOR = "v1/core/kv_cache_coordinator.py"
MANAGER = "v1/core/kv_cache_manager.py"


def test_the_version_is_one_that_was_tested() -> None:
    match = re.search(r"__version__ = (?:version = )?'([^']+)'", text("_version.py"))
    assert match, "vllm/_version.py does not say its version any more"
    assert versions.check_version(match[1]) == match[1]


def test_plugins_are_found_by_entry_point_and_loaded_before_the_worker_is_chosen() -> None:
    assert "vllm.general_plugins" in text("plugins/__init__.py")
    assert "load_general_plugins" in calls("engine/arg_utils.py", "EngineArgs", "__post_init__")
    assert "load_general_plugins" in calls("v1/engine/core.py", "EngineCore", "__init__")
    assert calls("v1/worker/worker_base.py", "WorkerWrapperBase", "init_worker").count("resolve_obj_by_qualname") >= 1


def test_the_platform_fills_in_the_worker() -> None:
    method = find("platforms/cuda.py", "CudaPlatformBase", "check_and_update_config")
    assert [ast.unparse(one) for one in method.decorator_list] == ["classmethod"]
    assert parameters("platforms/cuda.py", "CudaPlatformBase", "check_and_update_config") == ["cls", "vllm_config"]
    assert "worker_cls == 'auto'" in ast.unparse(method), "the platform does not fill in worker_cls any more"


def test_weights_are_loaded_where_the_worker_says() -> None:
    assert parameters(WORKER, "Worker", "_maybe_get_memory_pool_context") == ["self", "tag"]
    assert "self._maybe_get_memory_pool_context(tag='weights')" in text(WORKER, "Worker", "load_model")
    assert "self._maybe_get_memory_pool_context(tag='kv_cache')" in text(WORKER, "Worker", "initialize_from_config")


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("init_device", ["self"]),
        ("initialize_from_config", ["self", "kv_cache_config"]),
        ("compile_or_warm_up_model", ["self"]),
        ("execute_model", ["self", "scheduler_output"]),
        ("sample_tokens", ["self", "grammar_output"]),
        ("execute_dummy_batch", ["self"]),
        ("sleep", ["self", "level"]),
        ("wake_up", ["self", "tags"]),
        ("start_weight_update", ["self"]),
        ("update_weights", ["self", "update_info"]),
        ("finish_weight_update", ["self"]),
    ],
)
def test_the_worker_has_the_methods_that_ours_overrides(method: str, wanted: list[str]) -> None:
    assert parameters(WORKER, "Worker", method) == wanted, f"Worker.{method} takes other arguments"


def test_each_model_runner_asks_one_function_for_its_cache() -> None:
    assert parameters(V2_CACHE, "_allocate_kv_cache") == ["kv_cache_config", "shared_layers", "device"]
    assert "_allocate_kv_cache" in calls(V2_CACHE, "init_kv_cache"), "the V2 runner allocates its cache elsewhere"
    assert parameters(V1_RUNNER, "GPUModelRunner", "_allocate_kv_cache_tensors") == ["self", "kv_cache_config"]
    asked = calls(V1_RUNNER, "GPUModelRunner", "initialize_kv_cache_tensors")
    assert "self._allocate_kv_cache_tensors" in asked, "the V1 runner allocates its cache elsewhere"


def test_one_function_decides_whether_layers_lie_side_by_side() -> None:
    utils = "v1/core/kv_cache_utils.py"
    decides = "_use_packed_kv_cache_config"
    assert parameters(utils, decides) == ["vllm_config", "kv_cache_groups"], "the decision is told other things"
    for asking in ("_pool_bytes_per_block", "get_kv_cache_config_from_groups"):
        assert decides in calls(utils, asking), f"{asking} decides by something else"
    planned = text(utils, "_get_kv_cache_config_packed")
    for said in ("offset=byte_offset", "block_stride=total_num_bytes_per_block", "size=total_size"):
        assert said in planned, f"a packed plan is told otherwise: there is no {said}"
    assert "get_kv_cache_configs" in calls("v1/engine/core.py", "EngineCore", "_initialize_kv_caches")
    for path, names in (
        (V2_CACHE, ("_reshape_kv_cache",)),
        (V1_RUNNER, ("GPUModelRunner", "_reshape_kv_cache_tensors")),
    ):
        said = text(path, *names)
        assert "layer_packing[ln] = (kv_tensor.offset, kv_tensor.block_stride)" in said, f"{names[-1]} cuts otherwise"
    cut = text(V2_CACHE, "_reshape_attention_kv_cache")
    assert "kv_raw_tensor.view(-1, block_stride)[:, offset:offset + page_bytes]" in cut, (
        "packed views are cut otherwise"
    )
    assert "_reshape_attention_kv_cache" in calls(V1_RUNNER, "GPUModelRunner", "_reshape_kv_cache_tensors")


def test_layers_say_what_their_attention_and_their_kv_are() -> None:
    assert parameters("v1/worker/utils.py", "select_common_block_size") == ["kv_manager_block_size", "backends"]
    asked = text(V2_CACHE, "get_kv_cache_spec")
    assert "attn_module.get_attn_backend()" in asked, "a layer's backend is asked for otherwise"
    assert "indexes_kv_by_block_stride=indexes" in asked, "the V2 runner does not say how attention finds blocks"
    assert "return 'FLASH_ATTN'" in text("v1/attention/backends/flash_attn.py", "FlashAttentionBackend", "get_name")
    spec = text("v1/kv_cache_interface.py", "AttentionSpec")
    for name in ("kv_quant_mode: KVQuantMode", "page_size_padded: int | None", "indexes_kv_by_block_stride: bool"):
        assert name in spec, f"AttentionSpec has no {name} any more"
    assert "NONE = 0" in text("v1/kv_cache_interface.py", "KVQuantMode")
    assert "head_size_v: int" in text("v1/kv_cache_interface.py", "FullAttentionSpec")
    assert "static_forward_context" in text("config/vllm.py", "get_layers_from_vllm_config")


def test_a_cache_is_flat_tensors_of_bytes_by_layer() -> None:
    for path, names in (
        (V2_CACHE, ("_allocate_kv_cache",)),
        (V1_RUNNER, ("GPUModelRunner", "_allocate_kv_cache_tensors")),
    ):
        said = text(path, *names)
        assert "torch.zeros" in said, f"{names[-1]} does not allocate flat tensors any more"
        assert "dtype=torch.int8" in said, f"{names[-1]} makes tensors of another type"
        assert "for layer_name in kv_cache_tensor.shared_by" in said, f"{names[-1]} gives other than one tensor a layer"
    tensor = text("v1/kv_cache_interface.py", "KVCacheTensor")
    for field in ("size: int", "shared_by: list[str]", "block_stride: int"):
        assert field in tensor, f"KVCacheTensor has no {field.split(':')[0]} any more"
    assert "num_blocks: int" in text("v1/kv_cache_interface.py", "KVCacheConfig")


def test_graphs_are_captured_into_the_platforms_pool() -> None:
    said = text("platforms/interface.py", "Platform", "get_global_graph_pool")
    assert "cls._global_graph_pool" in said, "the global graph pool is kept elsewhere"
    for path in ("v1/worker/gpu/cudagraph_utils.py", "compilation/cuda_graph.py"):
        assert "current_platform.get_global_graph_pool()" in text(path), f"vllm/{path} captures into another pool"


def test_the_coordinator_makes_the_pool_by_its_modules_name() -> None:
    assert "BlockPool" in calls(COORDINATOR, "KVCacheCoordinator", "__init__")
    made = [
        node for node in ast.walk(find(COORDINATOR, "KVCacheCoordinator", "__init__"))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "BlockPool"
    ]  # fmt: skip
    assert "num_gpu_blocks" in [word.arg for word in made[0].keywords]


def test_the_pool_keeps_its_free_blocks_in_one_queue() -> None:
    used = {
        node.attr for node in ast.walk(find(POOL, "BlockPool"))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.free_block_queue"
    }  # fmt: skip
    ours = {"popleft", "popleft_n", "remove", "append", "append_n", "prepend_n", "num_free_blocks"}
    assert used <= ours, f"the pool asks its queue for {sorted(used - ours)} too"
    said = text(POOL, "BlockPool", "free_blocks")
    assert re.search(
        r"block\.block_hash is None.*prepend_n\(blocks_without_hash\).*append_n\(blocks_with_hash\)", said, re.S
    )
    assert "self.null_block = self.free_block_queue.popleft()" in text(POOL, "BlockPool", "__init__")
    assert "self.get_num_free_blocks()" in text(POOL, "BlockPool", "reset_prefix_cache")


def test_blocks_are_counted_before_they_are_asked_for_and_taken() -> None:
    asked = calls(MANAGER, "KVCacheManager", "allocate_slots")
    counted = [at for at, name in enumerate(asked) if name == "self.coordinator.get_num_blocks_to_allocate"]
    promised = [at for at, name in enumerate(asked) if name == "self.block_pool.get_num_free_blocks"]
    taken = asked.index("self.coordinator.allocate_new_blocks")
    assert counted, "allocate_slots does not count blocks with get_num_blocks_to_allocate any more"
    assert len(counted) == len(promised)
    assert all(count < promise for count, promise in zip(counted, promised, strict=True))
    assert promised[-1] < taken


def test_what_is_freed_is_freed_after_the_steps_that_were_launched() -> None:
    assert "self._drain_deferred_frees" in calls("v1/core/sched/scheduler.py", "Scheduler", "update_from_output") or (
        "_drain_deferred_frees" in text("v1/core/sched/scheduler.py")
    )


def test_an_engine_can_be_paused_without_forgetting_its_cache() -> None:
    wanted = ["self", "mode", "wait_for_inflight_requests", "clear_cache"]
    assert parameters("v1/engine/async_llm.py", "AsyncLLM", "pause_generation") == wanted
    assert parameters("v1/engine/async_llm.py", "AsyncLLM", "resume_generation") == ["self"]
    assert "collective_rpc" in text("v1/engine/async_llm.py", "AsyncLLM")
    assert parameters("entrypoints/llm.py", "LLM", "collective_rpc")[:2] == ["self", "method"]


def test_weights_that_are_written_anew_are_known_to_be() -> None:
    for name in ("_start_weight_update", "update_weights", "finish_weight_update"):
        assert "self._weight_update_active" in text(WORKER, "Worker", name), f"{name} does not say so any more"


def test_a_token_can_be_asked_for_beside_other_requests() -> None:
    wanted = ["self", "prompt", "sampling_params", "request_id"]
    assert parameters("v1/engine/async_llm.py", "AsyncLLM", "generate")[:4] == wanted
    sampling = text("sampling_params.py", "SamplingParams")
    for name in ("max_tokens", "temperature", "logprobs", "ignore_eos", "detokenize"):
        assert f"{name}:" in sampling, f"sampling has no {name}"
    assert "request_id: str" in text("v1/engine/__init__.py", "EngineCoreOutput"), "outputs do not say whose they are"


def test_warming_up_uses_the_first_blocks() -> None:
    said = text("v1/worker/gpu/warmup.py", "warmup_kernels")
    assert "next_block_id = 1" in said, "warming up numbers its blocks otherwise"
    assert "prompt_len = decode_query_len + 1" in said, "warming up uses prompts of another length"
    assert "decode_len = prompt_len + decode_query_len" in said
    assert "model_runner.scheduler_config.max_num_seqs" in said


def test_the_api_server_is_built_of_three_functions() -> None:
    server = "entrypoints/openai/api_server.py"
    assert parameters(server, "setup_server") == ["args", "reuse_port"], "setup_server takes other arguments"
    assert "args.uds" in text(server, "setup_server"), "the API server does not listen at a Unix socket any more"
    assert parameters(server, "build_async_engine_client")[0] == "args"
    assert parameters(server, "build_and_serve")[:4] == ["engine_client", "listen_address", "sock", "args"]
    worker = calls(server, "run_server_worker")
    assert {"build_async_engine_client", "build_and_serve"} <= set(worker), "run_server_worker is built otherwise"
    assert "await shutdown_task" in text(server, "run_server_worker"), "build_and_serve gives nothing to await any more"
    assert "'/health'" in text("entrypoints/serve/instrumentator/health.py"), "nothing answers at /health"


def test_arguments_are_read_by_one_parser_and_have_the_names_that_we_give() -> None:
    arguments = "entrypoints/openai/cli_args.py"
    assert parameters(arguments, "make_arg_parser") == ["parser"]
    assert parameters(arguments, "validate_parsed_serve_args") == ["args"]
    assert "class FlexibleArgumentParser" in text("utils/argparse_utils.py")
    engine = text("engine/arg_utils.py")
    for name in (
        "--model", "--served-model-name", "--worker-cls", "--distributed-executor-backend", "--max-model-len",
        "--dtype", "--enable-prefix-caching", "--shutdown-timeout",
    ):  # fmt: skip
        assert f"'{name}'" in engine, f"vLLM has no {name} any more"
    assert "uds: str | None" in text(arguments, "BaseFrontendArgs") or "uds:" in text(arguments), "vLLM has no --uds"
    assert "'uni'" in text("config/parallel.py"), "there is no executor within the engine's process"


def test_requests_take_a_salt_on_their_way_to_the_engine() -> None:
    server, engine, inputs = (
        "entrypoints/openai/api_server.py",
        "v1/engine/async_llm.py",
        "v1/engine/input_processor.py",
    )
    built = text(server, "build_app")
    assert "for middleware in args.middleware" in built, "there is no --middleware any more"
    assert "app.add_middleware(imported)" in built, "a middleware may not be a class any more"
    assert "self.input_processor = InputProcessor(" in text(engine, "AsyncLLM", "__init__")
    for method in ("add_request", "_add_streaming_input_request"):
        assert "self.input_processor.process_inputs" in calls(engine, "AsyncLLM", method), f"{method} makes its own"
    assert "EngineCoreRequest(" in text(inputs, "InputProcessor", "process_inputs"), "it makes no request any more"
    assert "cache_salt: str | None" in text("v1/engine/__init__.py", "EngineCoreRequest"), "requests have no salt"
    assert "request.cache_salt" in text("v1/core/kv_cache_utils.py"), "the salt is no part of a block's hash any more"


def test_an_idle_engine_says_so_in_its_loop_and_is_woken_by_its_queue() -> None:
    core = "v1/engine/core.py"
    loop = text(core, "EngineCoreProc", "_process_input_queue")
    notified, waits = loop.find("self._notify_idle_state_callbacks()"), loop.find("self.input_queue.get(block=block)")
    assert 0 <= notified < waits, "an engine waits for requests without looking for idle work before"
    assert parameters(core, "EngineCoreProc", "_notify_idle_state_callbacks") == ["self"]
    said = text(core, "EngineCoreProc", "_handle_client_request")
    assert re.search(r"EngineCoreRequestType\.WAKEUP:\s+return", said), "WAKEUP means something now"
    assert "WAKEUP" in text("v1/engine/__init__.py", "EngineCoreRequestType")


def test_a_step_is_launched_by_the_thread_that_schedules() -> None:
    executor = "v1/executor/uniproc_executor.py"
    assert "run_method" in calls(executor, "UniProcExecutor", "collective_rpc")
    assert "submit" not in text(executor, "UniProcExecutor", "collective_rpc"), "steps are launched by another thread"
    assert "self.collective_rpc" in calls(executor, "UniProcExecutor", "execute_model")


def test_the_scheduler_counts_requests_and_gives_tokens() -> None:
    scheduler = "v1/core/sched/scheduler.py"
    assert "Returns (num_running_reqs, num_waiting_reqs)" in text(scheduler, "Scheduler", "get_request_counts")
    assert "dict[int, EngineCoreOutputs]" in text(scheduler, "Scheduler", "update_from_output").split(":\n", 1)[0]
    assert "new_token_ids: list[int]" in text("v1/engine/__init__.py", "EngineCoreOutput")
    assert "outputs: list[EngineCoreOutput]" in text("v1/engine/__init__.py", "EngineCoreOutputs")


def test_a_start_beside_others_is_decided_by_two_settings() -> None:
    check = text("v1/worker/utils.py", "request_memory")
    assert "cache_config.gpu_memory_utilization" in check, "the check at the start goes by something else"
    profiling = text(WORKER, "Worker", "determine_available_memory")
    given, asserts = profiling.find("self.cache_config.kv_cache_memory_bytes"), profiling.find("assert ")
    assert 0 <= given < asserts, "profiling looks at what is free before it looks at kv_cache_memory_bytes"
    assert "return self._reserve_mm_ipc_gpu_memory(kv_cache_memory_bytes)" in profiling or re.search(
        r"if .*kv_cache_memory_bytes.*:.*?return", profiling, re.S
    )
    assert parameters(WORKER, "Worker", "load_model")[0] == "self"


def test_the_stand_in_has_the_seams_that_the_tests_of_the_shelf_stand_on() -> None:
    """What `tests/vllm/fake` calls by a name is called so in vLLM too."""
    fake = Path(__file__).parent / "fake" / "vllm"
    pairs = {
        "v1/worker/gpu_worker.py": ("Worker", {"_fail"}),
        "v1/core/block_pool.py": ("BlockPool", set()),
        "v1/engine/core.py": ("EngineCoreProc", {"_read", "_handle"}),
    }
    for path, (name, own) in pairs.items():
        theirs = {node.name for node in ast.walk(find(path, name)) if isinstance(node, ast.FunctionDef)}
        if path == "v1/engine/core.py":
            theirs |= {"__init__"}
        tree = ast.parse((fake / path).read_text("utf-8"))
        made = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        named = {node.name for node in made.body if isinstance(node, ast.FunctionDef)} - own
        assert named <= theirs, f"vllm/{path}: {name} has no {sorted(named - theirs)}"


def test_a_step_says_what_it_computes_and_for_whom() -> None:
    output, core = "v1/core/sched/output.py", "v1/engine/core.py"
    said = text(output, "SchedulerOutput")
    for field in (
        "scheduled_new_reqs: list[NewRequestData]", "scheduled_cached_reqs: CachedRequestData",
        "num_scheduled_tokens: dict[str, int]", "total_num_scheduled_tokens: int",
        "scheduled_spec_decode_tokens: dict[str, list[int]]", "scheduled_encoder_inputs: dict[str, list[int]]",
    ):  # fmt: skip
        assert field in said, f"SchedulerOutput has no {field} any more"
    assert "req_id: str" in text(output, "NewRequestData")
    assert "resumed_req_ids: set[str]" in text(output, "CachedRequestData")
    scheduler = "v1/core/sched/scheduler.py"
    assert "self.requests: dict[str, Request]" in text(scheduler, "Scheduler", "__init__")
    assert "request.num_preemptions += 1" in text(scheduler, "Scheduler", "_preempt_request")
    for step in ("step", "step_with_batch_queue"):
        said = text(core, "EngineCore", step)
        assert "self.scheduler.schedule(" in said, f"{step} schedules otherwise"
        assert "self.scheduler.update_from_output(scheduler_output, model_output)" in said, f"{step} ends otherwise"


def test_a_cached_block_that_is_used_again_is_taken_out_of_the_queue() -> None:
    assert "self.free_block_queue.remove" in calls(POOL, "BlockPool", "touch")
    others = [name for name in ("get_new_blocks", "free_blocks", "evict_blocks", "reset_prefix_cache")
              if "self.free_block_queue.remove" in calls(POOL, "BlockPool", name)]  # fmt: skip
    assert not others, f"{others} take blocks out that nobody has found"
