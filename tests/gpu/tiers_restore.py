"""A forgotten prefix of an 8B's shape: brought back from host memory and from disk, against computing it again.

Run by `tests/gpu/run.sh tiers_restore`. A Llama of 8B's layers with random weights in the worker's own engine, no HTTP:
prompts of 4k, 16k and 64k tokens are computed, then found on the device, in host memory and on disk, with everything
that was computed of them forgotten on the device in between. The ceiling of a first token is the same prompt found on
the device, and the link's (or the disk's) time for its bytes; that of a restore is the link from page-locked memory, or
direct reads of the same disk, both measured here. Beside each rate stand the shares of its time: looking up, waiting
for reads, copies (in which verifying is hidden), what verifying took beyond them. What comes back has to give the
token that the device's own blocks gave. $SHOAL_TIERS_DEVICE=sim makes a small dry run; $SHOAL_DISK names a directory on
the disk to measure.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from benches.results import Row, of_samples, save_gpu
from benches.tiers_restore import DISK_TARGET, HOST_TARGET, direct_read_s, free_bytes, shares_line, shares_of
from tests.gpu.tiers_blocks import DEVICE, GIB, MIB, ON_GPU, WAIT_S, device_memory, link_bytes_per_s

from shoal.worker.device import DeviceMemory
from shoal.worker.engine_causal import CausalEngine
from shoal.worker.kv import KvLayout
from shoal.worker.limits import CausalLimits
from shoal.worker.sampling import Sampling
from shoal.worker.spec import DiskShare, WorkerSpec

if TYPE_CHECKING:
    from shoal import MemoryManager

SHAPE = (
    {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
     "intermediate_size": 14336}
    if ON_GPU else
    {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
     "intermediate_size": 512}
)  # fmt: skip
VOCABULARY, END = 257, 16
LENGTHS = (4 << 10, 16 << 10, 64 << 10) if ON_GPU else (128, 512)
CONTEXT = LENGTHS[-1] + 1024
STEP_TOKENS = 2048  # four times the server's default: longer steps compute a long prompt faster
COMPUTED, RESTORED = 2, 3
END_S = 420.0  # what is not measured by then is left out, and said
"""So that the part stays below eight minutes."""


def model() -> torch.nn.Module:
    """Make the model: seeded, on the host, in bfloat16."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SHAPE, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(DEVICE if ON_GPU else "cpu"):
        made = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return made.eval().requires_grad_(False).to("cpu")


class Bench:
    """The engine, and what is measured on it."""

    def __init__(self, mem: MemoryManager, where: Path, begun: float, link: float) -> None:
        self.where, self.begun, self.link = where, begun, link
        spec = WorkerSpec(source="x", kv_max_bytes=1 << 50, batch_tokens_max=STEP_TOKENS)
        made = model()
        if ON_GPU:
            torch.cuda.empty_cache()
        self.layout = KvLayout.of(made.config, made.dtype, spec.block_tokens)
        self.token_bytes = self.layout.block_bytes // self.layout.block_tokens
        spec = WorkerSpec(source="x", kv_max_bytes=CONTEXT * self.token_bytes, batch_tokens_max=STEP_TOKENS)
        if not ON_GPU:
            torch.set_num_threads(spec.threads)
        self.memory = DeviceMemory(mem)
        self.memory.place(made)
        self.engine = CausalEngine(made, self.memory, spec, CausalLimits.of(self.layout, CONTEXT, spec))
        kv = self.memory._kv
        assert kv is not None
        self.kv = kv
        self.engine.start()
        self.rows: list[Row] = []
        self.wrong = 0
        self.computed: dict[int, float] = {}
        self.cached: dict[int, float] = {}
        self.tokens: dict[int, list[int]] = {}
        self.say("the engine is ready")

    def say(self, what: str) -> None:
        """Print it with the time since the start."""
        print(f"{time.monotonic() - self.begun:6.1f} s  {what}", flush=True)

    @property
    def is_late(self) -> bool:
        """Whether the part should come to its end."""
        return time.monotonic() - self.begun > END_S

    def prompt(self, length: int) -> list[int]:
        """Make a prompt of so many tokens and a few more."""
        draw = random.Random(length)
        return [draw.randrange(1, VOCABULARY) for _ in range(length + END)]

    def first_token(self, length: int, salt: str, found: int) -> tuple[float, list[int]]:
        """Ask for a prompt; gives the seconds to its first token, and that. So much of it has to be found."""

        async def ask() -> tuple[float, list[int]]:
            prompt = self.prompt(length)
            start = time.perf_counter()
            generation = self.engine.submit(prompt, Sampling(temperature=0.0), 1, salt=salt)
            async for tokens in generation:
                taken = time.perf_counter() - start
                if generation.cached_tokens != found:
                    msg = f"{generation.cached_tokens} of {length} tokens were found, not {found}: {self.told()}"
                    raise RuntimeError(msg)
                return taken, tokens
            raise RuntimeError("there was no token")

        return asyncio.run(ask())

    def told(self) -> object:
        """Give what the tiers did."""
        return self.memory.tiers()

    def compute(self) -> None:
        """Measure what computing a prompt takes, and one that is on the device."""
        self.first_token(LENGTHS[0], "warm", 0)
        for length in LENGTHS:
            times, found, tokens = [], [], list[int]()
            for number in range(COMPUTED):
                self.kv.forget_all()
                taken, _ = self.first_token(length, f"computed {number}", 0)
                times.append(taken)
            for _ in range(RESTORED):
                taken, tokens = self.first_token(length, f"computed {COMPUTED - 1}", length)
                found.append(taken)
            name = f"{length} tokens"
            self.rows.append(of_samples(f"{name} computed", "first token", times, "s", "lower"))
            self.rows.append(of_samples(f"{name} found on the device", "first token", found, "s", "lower"))
            self.computed[length], self.cached[length] = self.rows[-2].value, self.rows[-1].value
            self.tokens[length] = tokens
            self.say(f"{name}: computed in {self.computed[length]:.3f} s, found in {self.cached[length]:.4f} s")
        self.kv.forget_all()

    def keep_in(self, tier: str, nbytes: int) -> None:
        """Connect a tier, and no other."""
        disks = [DiskShare(str(self.where / "kv"), nbytes, 1 << 50)] if tier == "disk" else []
        self.memory.keep_below(nbytes if tier == "host" else 0, disks, lambda: {"model": "8b"}, WAIT_S)
        deadline = time.monotonic() + 60
        while any(told["reason"] for told in self.memory.tiers()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the tier does not open: {self.told()}")
            time.sleep(0.01)
        self.say(f"{tier}: {self.told()}")

    def restore(self, tier: str, ceiling: float, target: float) -> None:
        """Measure prefixes that come back from a tier; `ceiling` in bytes a second."""
        self.keep_in(tier, sum(LENGTHS) * self.token_bytes * 5 // 4 + 512 * MIB)
        below = self.kv.below
        assert below is not None
        for length in LENGTHS:
            if self.is_late:
                self.say(f"{length} tokens from {tier} are left out: no time")
                continue
            # In salts of its own, so that it is computed, sealed and saved.
            self.first_token(length, tier, 0)
            begun, connection = time.perf_counter(), below._tier
            assert connection is not None
            if not connection.flush(WAIT_S):
                raise RuntimeError(f"{tier}: {length} tokens were not saved in time: {self.told()}")
            self.say(f"{length} tokens are in {tier}, {time.perf_counter() - begun:.2f} s after their answer")
            times, rates, nbytes = [], [], length * self.token_bytes
            shares: dict[str, float] = {}
            for number in range(RESTORED):
                if number and self.is_late:
                    break
                self.kv.forget_all()
                before = connection.usage()
                taken, tokens = self.first_token(length, tier, length)
                times.append(taken)
                after = connection.usage()
                rates.append(nbytes / (after["load_us"] - before["load_us"]) * 1e6 / GIB)
                shares = shares_of(after, before)
                self.wrong += tokens != self.tokens[length]
            row = of_samples(f"{length} tokens from {tier}", "first token", times, "s", "lower")
            row.ceiling = self.cached[length] + nbytes / ceiling
            row.peer, row.peer_value = "computing them", self.computed[length]
            rate = of_samples(f"{length} tokens from {tier}", "restored", rates, "GiB/s", "higher")
            rate.ceiling = ceiling / GIB
            rate.target = target * rate.ceiling
            rate.met = rate.value >= rate.target
            self.rows += [row, rate]
            self.rows += [
                Row(rate.case, f"share of the restore's time: {name}", share, "", "lower")
                for name, share in shares.items()
            ]
            self.say(row.line())
            self.say(rate.line())
            self.say(shares_line(shares))
            self.save()
        self.kv.forget_all()
        self.memory.close()
        self.kv.below = None

    def save(self) -> None:
        """Write what there is: what a limit of time cuts off has at least this."""
        if ON_GPU:
            with contextlib.redirect_stdout(io.StringIO()):
                save_gpu(Path(os.environ["SHOAL_RESULT"]), self.rows)

    def run(self) -> None:
        """Measure all."""
        link = self.link
        self.rows.append(Row("the link, host to device", "rate", link / GIB, "GiB/s", "higher"))
        self.compute()
        self.restore("host", link, HOST_TARGET)
        need = int(sum(LENGTHS) * self.token_bytes * 1.25) + 512 * MIB + 4 * GIB
        _, room = free_bytes(self.where)
        if room < need:
            self.say(f"the disk is left out: {room >> 20} MiB are free, {need >> 20} needed")
            return
        size = 4 * GIB if ON_GPU else 64 * MIB
        read = size / min(direct_read_s(self.where / "plain", size, 2))
        self.rows.append(Row("the disk, direct reads of 1 MiB, 32 deep", "rate", read / GIB, "GiB/s", "higher"))
        self.restore("disk", read, DISK_TARGET)


def main() -> int:
    """Measure; the exit status says whether what came back gave the same tokens."""
    begun = time.monotonic()
    base = Path(os.environ.get("SHOAL_DISK") or tempfile.gettempdir())
    bench = None
    link = link_bytes_per_s(up=True)
    with (
        tempfile.TemporaryDirectory(prefix="tiers-restore-", dir=base) as made,
        device_memory(30 * GIB if ON_GPU else 256 * MIB) as mem,
    ):
        bench = Bench(mem, Path(made), begun, link)
        try:
            bench.run()
        finally:
            answers = Row("answers that were not the device's own", "first token", bench.wrong, "answers", "lower")
            answers.target, answers.met = 0, bench.wrong == 0
            bench.rows.append(answers)
            bench.save()
            print("\n".join(row.line() for row in bench.rows))
            bench.engine.stop()
            bench.memory.close()
    return 0 if bench.wrong == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
