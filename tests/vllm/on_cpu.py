"""vLLM 0.26's whole engine on the simulated device: all but the model is vLLM's own, and the worker is Shoal's.

A plugin of vLLM's, which the processes of tests find by its entry points (:func:`found_by_vllm`), and the program that
they run. The model writes each token to all of its slot in both layers, and what it says follows from every slot of a
request: a block that was lost, or taken too early, gives another token.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["found_by_vllm", "platform", "register"]

LAYERS, TOKENS, WEIGHTS = 2, 16, 4096
KV_BYTES = 64 << 20
LIMIT_BYTES = 16 << 20
ANSWER = 6
LAST = TOKENS - ANSWER + 1
"""Of a prompt beyond whole blocks: the step that makes the last token of its answer fills a block."""
WEIGHT = torch.arange(1, WEIGHTS + 1) * 7919 % 199 + 1


def found_by_vllm(site: Path) -> None:
    """Let vLLM find this in a folder that is on the path."""
    info = site / "shoal_on_cpu-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shoal-on-cpu\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        f"[vllm.platform_plugins]\nshoal_on_cpu = {__name__}:platform\n\n"
        f"[vllm.general_plugins]\nshoal_on_cpu = {__name__}:register\n"
    )


def platform() -> str:
    """Name the class: one that says that it is a CPU, and asks for nothing of one."""
    return "tests.vllm.on_cpu_platform.SimulatedPlatform"


def answer(prompt: list[int]) -> list[int]:
    """Give all that the model says after a prompt."""
    said = list(prompt)
    for _ in range(ANSWER):
        said.append(says(said))
    return said[len(prompt) :]


def says(tokens: list[int]) -> int:
    """Give what the model says after some tokens."""
    made = torch.tensor(tokens)
    total = sum(int((2 * ((made + layer) % 128) * WEIGHT[: len(tokens)]).sum()) for layer in range(LAYERS))
    return 5 + total % 90


class Copies:
    """vLLM's copies between device and staging memory: what it is told of them comes two steps after they were made."""

    def __init__(self, kv: Any, region: Any, blocks_per_chunk: int) -> None:
        assert blocks_per_chunk == 1
        self.device = [one.tensor.view(torch.int8).view(-1, one.page_size_bytes) for one in kv.tensors]
        self.staged = [region.create_next_view(one.page_size_bytes) for one in kv.tensors]
        self.ended: list[list[Any]] = [[], [], []]
        # None of them runs on a stream.
        self._store_handler = self._load_handler = SimpleNamespace(_transfers=())

    def _copy(self, job: int, pairs: Any, *, up: bool) -> bool:
        from vllm.v1.kv_offload.base import TransferResult

        for block, row in pairs:
            for device, staged in zip(self.device, self.staged, strict=True):
                if up:
                    device[block] = staged[row]
                else:
                    staged[row] = device[block]
        self.ended[-1].append(TransferResult(job, True))
        return True

    def submit_store(self, job: int, source: Any, target: Any) -> bool:
        return self._copy(job, zip(source.block_ids, target.block_ids, strict=True), up=False)

    def submit_load(self, job: int, source: Any, target: Any) -> bool:
        return self._copy(job, zip(target.block_ids, source.block_ids, strict=True), up=True)

    def get_finished(self) -> list[Any]:
        self.ended.append([])
        return self.ended.pop(0)

    def wait(self, jobs: set[int]) -> None:
        """All of them have ended."""

    def shutdown(self) -> None:
        """There is nothing to end."""


class Runner:
    """The model, and what vLLM's runner does about it."""

    def __init__(self) -> None:
        self.model = torch.nn.Embedding(1024, 256)
        self.requests: dict[str, Any] = {}
        self.layers: list[torch.Tensor] = []
        self.connector: Any = None

    def reset_mm_cache(self) -> None:
        """There is none."""

    def step(self, scheduled: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        for name in scheduled.finished_req_ids:
            self.requests.pop(name, None)
        for new in scheduled.scheduled_new_reqs:
            self.requests[new.req_id] = SimpleNamespace(
                tokens=list(new.prompt_token_ids), blocks=list(new.block_ids[0]), computed=new.num_computed_tokens
            )
        known = scheduled.scheduled_cached_reqs
        for at, name in enumerate(known.req_ids):
            one, blocks = self.requests[name], known.new_block_ids[at]
            if name in known.resumed_req_ids:
                one.blocks = list(blocks[0])
            elif blocks is not None:
                one.blocks += blocks[0]
            one.computed = known.num_computed_tokens[at]
        self.connector.pre_forward(scheduled)
        said = {name: self._compute(name, count) for name, count in scheduled.num_scheduled_tokens.items()}
        names = list(said)
        return ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: at for at, name in enumerate(names)},
            sampled_token_ids=list(said.values()), logprobs=None, prompt_logprobs_dict=dict.fromkeys(names),
            pooler_output=[], kv_connector_output=self.connector.post_forward(scheduled.finished_req_ids),
        )  # fmt: skip

    def _compute(self, name: str, count: int) -> list[int]:
        one = self.requests[name]
        end = one.computed + count
        at = torch.arange(end)
        blocks = torch.tensor(one.blocks)[at // TOKENS]
        tokens = torch.tensor(one.tokens[:end])
        new = slice(one.computed, end)
        total = 0
        for layer, cells in enumerate(self.layers):
            cells[blocks[new], at[new] % TOKENS] = ((tokens[new] + layer) % 128).to(torch.int8)[:, None]
            slots = cells[blocks, at % TOKENS].to(torch.int64)
            total += int(((slots[:, 0] + slots[:, -1]) * WEIGHT[:end]).sum())
        if end < len(one.tokens):
            return []
        one.tokens.append(5 + total % 90)
        return one.tokens[-1:]


def register() -> None:
    """Put the model in the place of vLLM's, under Shoal's worker."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.distributed.kv_transfer import ensure_kv_transfer_initialized
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
    from vllm.v1.worker import gpu_worker, worker_base
    from vllm.v1.worker.gpu import attn_utils
    from vllm.v1.worker.gpu.kv_connector import get_kv_connector

    from shoal.vllm import worker
    from shoal.vllm.memory import EngineMemory

    base = gpu_worker.Worker

    def init_device(self: Any) -> None:
        with set_current_vllm_config(self.vllm_config):
            init_distributed_environment(1, 0, self.distributed_init_method, 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        self.model_runner = Runner()

    def initialize_from_config(self: Any, config: Any) -> None:
        ensure_kv_transfer_initialized(self.vllm_config, config)
        found = attn_utils._allocate_kv_cache(config, None, None)
        runner = self.model_runner
        runner.layers = [found[f"layer {layer}"].view(config.num_blocks, TOKENS, -1) for layer in range(LAYERS)]
        runner.connector = get_kv_connector(self.vllm_config, found)

    def execute_model(self: Any, scheduled: Any) -> Any:
        if not scheduled.num_scheduled_tokens:
            for name in scheduled.finished_req_ids:
                self.model_runner.requests.pop(name, None)
            return self.model_runner.connector.no_forward(scheduled)
        self._made = self.model_runner.step(scheduled)
        return None

    def get_worker(self: Any, kv: Any) -> Any:
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self._engine_id, num_blocks=self.num_blocks, rank=0,
                kv_bytes_per_block=self.kv_bytes_per_chunk, cpu_page_size=self.cpu_page_size_per_worker,
            )  # fmt: skip
            self._worker = Copies(kv, region, self.blocks_per_chunk)
        return self._worker

    spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=2, head_size=512, dtype=torch.bfloat16)
    replaced: dict[str, Any] = {
        "__init__": worker_base.WorkerBase.__init__,
        "init_device": init_device, "load_model": lambda _self, **_: None,
        "determine_available_memory": lambda _self: KV_BYTES,
        "get_kv_cache_spec": lambda _self: {f"layer {layer}": spec for layer in range(LAYERS)},
        "initialize_from_config": initialize_from_config,
        "compile_or_warm_up_model": lambda _self: gpu_worker.CompilationTimes(language_model=0.0, encoder=0.0),
        "execute_model": execute_model, "sample_tokens": lambda self, _grammar: self._made,
        "get_supported_tasks": lambda _self: ("generate",), "shutdown": lambda _self: None,
    }  # fmt: skip
    for name, function in replaced.items():
        setattr(base, name, function)
    CPUOffloadingSpec.get_worker = get_worker
    worker.Worker._open_memory = lambda _self: EngineMemory("sim")


class Engine:
    """An engine with a connector, and what is expected of it."""

    def __init__(self, model: str, connector: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=model, worker_cls="shoal.vllm.Worker", skip_tokenizer_init=True, max_model_len=512,
            enforce_eager=True, enable_prefix_caching=True, max_num_batched_tokens=512, max_num_seqs=12,
            kv_transfer_config=connector, disable_log_stats=False,
        )  # fmt: skip
        chance = random.Random(5)
        beginnings = [[chance.randrange(10, 120) for _ in range(chance.randrange(40, 160))] for _ in range(4)]
        self.prompts = []
        for number in range(24):
            own = [chance.randrange(10, 120) for _ in range(chance.randrange(10, 120))]
            prompt = chance.choice(beginnings) + own if number % 2 else own
            # The last step of an answer fills a block of half of them: it is stored when the request has ended.
            self.prompts.append(prompt[: (len(prompt) - LAST) // TOKENS * TOKENS + LAST] if number % 4 < 2 else prompt)
        self.right = [answer(prompt) for prompt in self.prompts]
        self.found: dict[str, Any] = {}

    def ask(self, what: str, seed: int) -> None:
        """Ask all prompts in some order; compare what is said."""
        order = random.Random(seed).sample(range(len(self.prompts)), len(self.prompts))
        self.compare(what, [self.prompts[at] for at in order], [self.right[at] for at in order])

    def go_on(self, what: str, seed: int) -> None:
        """Ask prompts that nobody asked, each until its end; forget at once; go on from what was said."""
        chance = random.Random(seed)
        prompts = [[chance.randrange(10, 120) for _ in range(TOKENS * (1 + at % 5) + LAST)] for at in range(10)]
        self.compare(what, prompts, [answer(prompt) for prompt in prompts])
        assert self.llm.reset_prefix_cache()
        self.llm.collective_rpc("shoal_kv_shrink", args=(KV_BYTES,))
        queue = self.pool().free_block_queue
        to_read = self.pool().cache.transfers.read()
        self.found[f"{what}: kept back"] = [len(to_read), queue.kept_back]
        longer = [[*prompt, *answer(prompt), *range(10, 20)] for prompt in prompts]
        for turn in ("gone on", "gone on again"):
            self.compare(f"{what}, {turn}", longer, [answer(prompt) for prompt in longer])
            assert self.llm.reset_prefix_cache()

    def compare(self, what: str, prompts: list[list[int]], right: list[list[int]]) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True, detokenize=False)
        made = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        wrong = [at for at, one in enumerate(made) if list(one.outputs[0].token_ids) != right[at]]
        found = sum(one.num_cached_tokens or 0 for one in made)
        self.found[what] = {"wrong": wrong, "found": found, "kv": self.usage()["mapped"]}
        print(what, self.found[what], flush=True)

    def usage(self) -> dict[str, Any]:
        return dict(self.llm.collective_rpc("shoal_usage")[0]["kv"])

    def pool(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool

    def run(self) -> None:
        from shoal.vllm import resume, suspend

        self.ask("first", 0)
        self.ask("again", 1)
        for turn in range(2):
            self.go_on(f"ended and forgotten, {turn}", 50 + turn)
        self.llm.collective_rpc("shoal_kv_limit", args=(LIMIT_BYTES,))
        self.ask("under a limit", 2)
        self.llm.collective_rpc("shoal_kv_limit", args=(KV_BYTES,))
        for kv in ("forget", "keep"):
            # What the last step freed is still to be copied then.
            suspend(self.llm, kv)
            resume(self.llm)
            self.ask(f"after a sleep, {kv}", len(self.found))
        self.llm.collective_rpc("shoal_kv_shrink", args=(KV_BYTES,))
        self.ask("after shrinking", 20)
        for staged in (False, True, True):
            assert self.llm.reset_prefix_cache(reset_connector=staged)
            self.ask(f"forgotten, staging too: {staged}, {len(self.found)}", 30 + len(self.found))
        # Whatever waits for copies is told of their end by steps.
        assert self.llm.reset_prefix_cache()
        # An engine that is not stepped hears no more of its copies; this has nothing that is stored.
        self.compare("at the end", [[10, 11]], [answer([10, 11])])
        self.found["kept back"] = self.pool().free_block_queue.kept_back
        self.llm.collective_rpc("shoal_kv_shrink", args=(KV_BYTES,))
        usage, memory = self.usage(), self.pool().cache
        self.found["left"] = [usage["live"] // (memory.plan.nbytes // memory.blocks), usage["empty"]]
        self.found["preemptions"] = sum(
            int(one.value) for one in self.llm.get_metrics() if one.name == "vllm:num_preemptions"
        )


def main() -> None:
    model, connector, out = sys.argv[1:]
    engine = Engine(model, json.loads(connector))
    try:
        engine.run()
    finally:
        Path(out).write_text(json.dumps(engine.found))
        engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
