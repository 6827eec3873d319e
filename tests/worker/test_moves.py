"""Every move carries every byte, and in bfloat16 evictions change nothing at all.

In bfloat16 a token may depend on its neighbours in the batch, so plain transformers is no measure. Here the same
engine is given the same batches twice: once with memory for all, once evicted before most of its steps. And since a
model may give the same tokens in spite of a wrong byte, the bytes are compared too: what a step leaves is hashed, and
hashed again when the next one begins, whatever moved in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random

import pytest
import torch

from shoal.testing import simulated_memory
from shoal.worker.device import DeviceKv, DeviceMemory

from .conftest import byte_tokenizer, llama
from .test_device_memory import WIDE
from .test_http import settled, working

MIB = 1 << 20
PIECE = 2 * MIB
PROMPTS = ["the sea", "the sea is wide and fish", "a", "shoals of fish swim in the sea", "def swim(", "the sea is"]


class WitnessedKv(DeviceKv):
    """KV blocks whose bytes are known between two steps."""

    def __init__(self, mem, layout, blocks, *, is_caching):
        super().__init__(mem, layout, blocks, is_caching=is_caching)
        tensor = self.tensor()
        self._bytes = tensor.view(torch.uint8).view(tensor.shape[0], -1)
        self.left: dict[int, bytes] = {}

    def free(self, blocks):
        super().free(blocks)
        for block in blocks:
            if not self._group.owners(block):
                self.left.pop(block, None)

    @property
    def owned(self):
        return [block for block in range(self._group.blocks) if self._group.owners(block)]

    def hashes(self, blocks):
        return {block: hashlib.blake2b(self._bytes[block].numpy(), digest_size=16).digest() for block in blocks}


class WitnessedMemory(DeviceMemory):
    """Hashes weights after each step, and KV after a step and before the next; `evict` is called in between."""

    def __init__(self, mem, evict=lambda: None):
        super().__init__(mem)
        self.mem, self.evict = mem, evict
        self.compared = {"weights": 0, "kv": 0}  # pieces that had moved, or stayed, and were as before
        self.wrong: list[str] = []

    def place(self, module, files=None, progress=None):
        before = {name: value.clone() for name, value in module.named_parameters()}
        size = super().place(module, files, progress)
        self.tensors = dict(module.named_parameters())
        self.first = {name: hashlib.blake2b(value.numpy(), digest_size=16).digest() for name, value in
                      ((name, as_bytes(value)) for name, value in before.items())}  # fmt: skip
        return size

    def kv(self, layout, blocks, *, is_caching):
        self._kv = WitnessedKv(self.mem, layout, blocks, is_caching=is_caching)
        return self._kv

    @contextlib.contextmanager
    def guard(self, timeout_s, is_wanted=None, *, tokens=0):
        self.evict()
        with super().guard(timeout_s, is_wanted, tokens=tokens) as is_beside_wake:
            for block, digest in self._kv.hashes(self._kv.left).items():
                if digest != self._kv.left[block]:
                    self.wrong.append(f"KV block {block}")
                self.compared["kv"] += 1
            yield is_beside_wake
            # The step may have begun before its weights were there, and has used each of them.
            for name, value in self.tensors.items():
                if hashlib.blake2b(as_bytes(value).numpy(), digest_size=16).digest() != self.first[name]:
                    self.wrong.append(name)
                self.compared["weights"] += 1
            self._kv.left = self._kv.hashes(self._kv.owned)


def as_bytes(value: torch.Tensor) -> torch.Tensor:
    return value.detach().reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide")
    llama(21, **WIDE).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def run(path, tmp_path, dtype, evict, ask):
    """Answer `ask` with all its prompts in the first batch: the answer, the batches, and the memory's witness."""
    with simulated_memory("96MiB", host_budget="96MiB") as mem:
        memory = WitnessedMemory(mem, (lambda: evict(mem)) if evict else lambda: None)
        batches = []

        async def act():
            async with working(
                path, tmp_path, memory, start=False, dtype=dtype, threads=1, kv_max_bytes=32 * MIB, batch_tokens_max=64
            ) as worker:
                engine = worker.engine
                step = engine._compute

                def compute():
                    states = [future.state for future in engine._processor.inputs_and_outputs.requests_in_batch]
                    batches.append([(state.request_id, len(state.tokens_to_process)) for state in states])
                    step()

                engine._compute = compute
                task = asyncio.create_task(worker.post("completions", ask))
                await settled(lambda: engine.counts().waiting == len(PROMPTS))
                engine.start()
                status, answer = await asyncio.wait_for(task, 60)
                assert status == 200, answer
                return answer["choices"]

        return asyncio.run(act()), batches, memory, mem.usage()


def evictor(seed):
    rng = random.Random(seed)

    def evict(mem):
        if (size := rng.choice([0, 2 * MIB, 6 * MIB, 1 << 40])) > 0:
            assert mem.reclaim(size).error is None

    return evict


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_evictions_change_no_token_no_likelihood_and_no_byte(wide_dir, tmp_path, dtype):
    ask = {"prompt": PROMPTS, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": 3}
    calm, batches, memory, usage = run(wide_dir, tmp_path, dtype, None, ask)
    assert memory.wrong == []
    assert usage["evicted"] == 0
    weights = usage["weights_total"]
    for seed in (1, 2):
        answer, again, memory, usage = run(wide_dir, tmp_path, dtype, evictor(seed), ask)
        assert again == batches, "the same batches: else there is nothing to compare"
        assert memory.wrong == []
        assert usage["evicted"] > 5 * weights, "most steps were meant to bring something back"
        assert usage["onboarded"] > 5 * weights
        assert memory.compared["kv"] > 100
        assert answer == calm, "texts and likelihoods, to the last bit"
    assert len({choice["text"] for choice in calm}) == len(PROMPTS)


def test_the_witness_sees_a_wrong_byte(wide_dir, tmp_path):
    """A byte of a weight or of a block that changes between two steps is found: the comparison is not empty."""
    touched = []

    def spoil(mem):
        memory = holder[0]
        if len(touched) < 2 and memory._kv.left:
            with mem.guard():
                block = min(memory._kv.left)
                memory._kv._bytes[block, 0] ^= 1
                as_bytes(next(iter(memory.tensors.values())))[0] ^= 1
            touched.append(block)

    holder = []
    original = WitnessedMemory.__init__

    def remember(self, *args):
        original(self, *args)
        holder.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WitnessedMemory, "__init__", remember)
        ask = {"prompt": PROMPTS, "max_tokens": 3, "temperature": 0, "ignore_eos": True}
        _, _, memory, _ = run(wide_dir, tmp_path, "float32", spoil, ask)
    assert f"KV block {touched[0]}" in memory.wrong
    assert any("weight" in name for name in memory.wrong)
