"""Shoal's tiers under vLLM's own offloading, with the real vLLM: its factory, its manager, its staging memory.

Skipped where vLLM 0.26 cannot be imported; what needs no vLLM is in `test_vllm_tiers.py`. The GPU's half, vLLM's copies
between GPU and staging memory, is played by hand; `tests/gpu/run.sh vllm_offload` has it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
import uuid
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import shoal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

try:
    VERSION = importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    VERSION = ""
pytestmark = pytest.mark.skipif(
    not VERSION.startswith("0.26."),
    reason=f"needs vLLM 0.26, and there is {VERSION or 'none'} (pip install 'shoal[vllm]')",
)

ROW = 8192
STAGED = 8


def configuration(model: Path, extra: dict[str, Any]) -> Any:
    """Make what vLLM gives an offloading spec: a model of one group of layers, chunks of one block of 8 KiB."""
    from vllm.v1.kv_offload import config

    return config.OffloadingConfig(
        groups=(config.OffloadingGroupConfig(16, ("layer.0", "layer.1")),),
        worker_kv_bytes_per_block=ROW,
        enable_kv_cache_events=False,
        extra_config={"spec_name": "ShoalOffloadingSpec", "spec_module_path": "shoal.vllm.offloading", **extra},
        engine_id=uuid.uuid4().hex,
        model=config.OffloadingModelConfig(str(model), "auto"),
        cache=config.OffloadingCacheConfig(16, 1),
        parallel=config.OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, True),
    )


def whole(model: Path, dtype: str = "torch.bfloat16") -> Any:
    """What vLLM's whole configuration says of the model."""
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(model), revision=None, dtype=dtype, quantization=None, hf_overrides={}),
        cache_config=SimpleNamespace(cache_dtype="auto", prefix_caching_hash_algo="sha256"),
    )


@contextlib.contextmanager
def engine(model: Path, dtype: str = "torch.bfloat16", **extra: Any) -> Iterator[Engine]:
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    from shoal.vllm import offloading

    config = configuration(model, {"cpu_bytes_to_use": f"{STAGED * ROW // 1024}KiB", **extra})
    offloading._remember(config.engine_id, whole(model, dtype))
    spec = OffloadingSpecFactory.create_spec(config)
    running = Engine(spec.get_manager())
    try:
        yield running
    finally:
        running.memory = np.zeros(0)
        running.manager.shutdown()


class Engine:
    """vLLM's scheduler as far as its offloading manager sees it, and the GPU's copies."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.memory = np.asarray(manager.primary_tier.get_kv_memoryview())
        self.requests = 0

    def step(self) -> None:
        from vllm.v1.kv_offload.base import ScheduleEndContext

        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def settle(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            self.step()
            if not self.manager.has_pending_work():
                return
            assert time.monotonic() < deadline, "a transfer does not end"
            time.sleep(0.002)

    @contextlib.contextmanager
    def request(self) -> Iterator[Any]:
        from vllm.v1.kv_offload.base import ReqContext

        self.requests += 1
        context = ReqContext(f"request {self.requests}")
        self.manager.on_new_request(context)
        yield context
        self.manager.on_request_finished(context)

    def compute(self, numbers: list[int]) -> None:
        """Have a request's chunks stored."""
        with self.request() as context:
            keys = {key(number): number for number in numbers}
            output = self.manager.prepare_store(list(keys), context)
            assert output is not None
            for one, row in zip(output.keys_to_store, output.store_spec.block_ids, strict=True):
                self.memory[row] = content(keys[one])
            self.manager.complete_store(output.keys_to_store, context)
        self.settle()

    def found(self, numbers: list[int]) -> list[int]:
        """Ask as the scheduler does until all is certain; give which chunks are there, and look at their bytes."""
        from vllm.v1.kv_offload.base import LookupResult

        deadline = time.monotonic() + 60
        with self.request() as context:
            while True:
                said = {number: self.manager.lookup(key(number), context) for number in numbers}
                self.step()
                if not {LookupResult.RETRY, LookupResult.HIT_PENDING} & set(said.values()):
                    break
                assert time.monotonic() < deadline, f"the scheduler would ask for ever: {said}"
                time.sleep(0.002)
            there = [number for number, answer in said.items() if answer is LookupResult.HIT]
            keys = [key(number) for number in there]
            spec = self.manager.prepare_load(keys, context)
            for number, row in zip(there, spec.block_ids, strict=True):
                assert (self.memory[row] == content(number)).all(), f"chunk {number} holds other bytes"
            self.manager.complete_load(keys, context)
        return there

    def forget(self) -> None:
        """What `/sleep` and `reset_prefix_cache(reset_connector=True)` do."""
        self.manager.reset_cache()
        self.memory[:] = 0

    def until_open(self, number: int) -> None:
        deadline = time.monotonic() + 60
        while not self.manager.secondary_tiers[0]._rows.has(key(number)):
            assert time.monotonic() < deadline, "the directory was not opened"
            time.sleep(0.01)


def key(number: int) -> Any:
    from vllm.v1.kv_offload.base import make_offload_key

    return make_offload_key(number.to_bytes(32, "big"), 0)


def content(number: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    return np.random.default_rng(number).integers(-128, 127, ROW, np.int8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_chunks_are_found_in_host_memory_once_staging_forgot_them(model: Path) -> None:
    with engine(model, host="4MiB") as running:
        assert running.found([1, 2, 3]) == []
        running.compute([1, 2, 3])
        assert running.found([1, 2, 3]) == [1, 2, 3]
        running.forget()
        assert running.found([1, 2, 3, 4]) == [1, 2, 3]
        # More than staging has: what it dropped is below.
        for first in range(10, 50, 5):
            running.compute(list(range(first, first + 5)))
        assert running.found([10, 11, 12]) == [10, 11, 12]
        assert running.found([1]) == [1]


def test_chunks_are_found_by_the_next_engine_and_never_by_another_model(model: Path, tmp_path: Path) -> None:
    disks = [{"path": str(tmp_path / "kv"), "bytes": "64MiB"}]
    with engine(model, host="4MiB", disks=disks) as running:
        running.compute([1, 2, 3, 4])
        with pytest.raises(shoal.TierError), engine(model, disks=disks):
            pass
    with engine(model, host="4MiB", disks=disks) as running:
        running.until_open(1)
        assert running.found([1, 2, 3, 4, 5]) == [1, 2, 3, 4]
    with engine(model, "torch.float16", disks=disks) as running:
        assert running.found([1]) == []
    (model / "model.safetensors").write_bytes(b"others!")
    with engine(model, disks=disks) as running:
        assert running.found([1]) == []


def test_a_damaged_chunk_is_a_miss_and_the_request_goes_on(model: Path, tmp_path: Path) -> None:
    disks = [{"path": str(tmp_path / "kv"), "bytes": "64MiB"}]
    with engine(model, disks=disks) as running:
        running.compute([1, 2, 3])
    wanted = content(2).tobytes()[100:164]
    (segment,) = [path for path in (tmp_path / "kv").rglob("*") if path.is_file() and wanted in path.read_bytes()]
    with segment.open("r+b") as file:
        file.seek(segment.read_bytes().index(wanted))
        file.write(bytes([wanted[0] ^ 8]))
    with engine(model, disks=disks) as running:
        running.until_open(1)
        assert running.found([1, 2, 3]) == [1, 3]
        stats = running.manager.secondary_tiers[0].get_stats()
        assert stats is not None
        # It is computed again, and kept again.
        running.compute([2])
        running.forget()
        assert running.found([1, 2, 3]) == [1, 2, 3]


def test_what_is_set_wrongly_is_said(model: Path, tmp_path: Path) -> None:
    for extra, said in (
        ({"host": "lots"}, "lots"),
        ({"disks": [str(tmp_path)]}, "a disk is"),
        ({"secondary_tiers": [{"type": "shoal", "host": "1MiB", "size": 1}]}, "not size"),
        ({"secondary_tiers": {"type": "shoal"}}, "must be a list"),
    ):
        with pytest.raises(ValueError, match=said), engine(model, **extra):
            pass


def test_it_stands_among_other_secondary_tiers(model: Path, tmp_path: Path) -> None:
    tiers = [{"type": "fs", "root_dir": str(tmp_path / "fs")}, {"type": "shoal", "host": "1MiB"}]
    with engine(model, secondary_tiers=tiers) as running:
        assert [tier.tier_type for tier in running.manager.secondary_tiers] == ["fs", "shoal"]
        running.compute([1])
        assert running.found([1]) == [1]


def test_nothing_is_read_into_rows_that_vllms_own_copies_may_still_write_to(model: Path) -> None:
    """After a reset vLLM's copies from the GPU end in the next step: rows that they go to count as free before."""
    from vllm.v1.kv_offload.base import LookupResult

    with engine(model, host="4MiB") as running:
        running.compute([1, 2, 3])
        running.forget()
        with running.request() as context:
            assert running.manager.lookup(key(1), context) is LookupResult.RETRY
            running.step()
            (rows,) = [job.block_ids for job in running.manager._transfer_jobs.values()]
            time.sleep(0.05)
            assert not running.manager.secondary_tiers[0]._rows.finished()
            # A copy that was on its way when all was forgotten; the step that carries the reset out waits for it.
            running.memory[rows[0]] = content(9)
            running.settle()
        assert running.found([1, 2, 3]) == [1, 2, 3]
        # Another reset at once: what waits is read before staging is given up, and asked for again.
        running.forget()
        with running.request() as context:
            assert running.manager.lookup(key(2), context) is LookupResult.RETRY
            running.step()
            running.forget()
        assert running.found([1, 2, 3]) == [1, 2, 3]


def test_vllms_own_scheduler_does_not_store_the_slot_of_the_last_token(model: Path) -> None:
    from types import SimpleNamespace

    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler

    with engine(model, host="1MiB"):
        ended = SimpleNamespace(
            num_prompt_tokens=20, num_tokens=32, num_computed_tokens=31, num_output_placeholders=0,
            is_finished=lambda: True,
        )  # fmt: skip
        scheduler = OffloadingConnectorScheduler.__new__(OffloadingConnectorScheduler)
        scheduler.config = SimpleNamespace(offload_prompt_only=False)
        status = SimpleNamespace(req=ended, max_offload_tokens=None)
        assert scheduler._calc_num_offloadable_tokens(status, ended.num_tokens) == 31


def test_a_spec_that_was_not_told_the_models_numbers_is_refused(model: Path) -> None:
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    spec = OffloadingSpecFactory.create_spec(configuration(model, {"host": "1MiB", "cpu_bytes_to_use": 1 << 16}))
    with pytest.raises(ValueError, match="ShoalConnector"):
        spec.get_manager()


def test_its_metrics_are_known_to_vllm() -> None:
    from shoal.vllm.offloading import METRICS, ShoalOffloadingSpec

    found = ShoalOffloadingSpec.build_metric_definitions({"host": "1GiB"})
    assert {f"vllm:kv_offload_shoal_{name}" for name in METRICS} <= set(found)


def test_block_hashes_are_the_same_in_the_next_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils

    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    found = set()
    for _ in range(2):
        with engine(model, host="1MiB"):
            kv_cache_utils.init_none_hash(get_hash_fn_by_name("sha256"))
            found.add(kv_cache_utils.NONE_HASH)
    assert len(found) == 1
