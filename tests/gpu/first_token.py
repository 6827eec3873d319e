"""First token of a sleeping 8B: woken in order of use, against waking whole first and against prefill alone.

Run by `tests/gpu/run.sh first_token`. A Llama of 8B's shape with random weights, in transformers, with sdpa. Everything
that is compared is measured here in turn, so that a drift of the link or of the clocks falls on all of it alike, and
every first token is compared bit by bit with that of the model that never slept.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from benches.results import Row, of_samples, save_gpu

import shoal
import shoal.torch as st

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = os.environ.get("SHOAL_FIRST_TOKEN_DEVICE", "cuda:0")
ON_GPU = DEVICE.startswith("cuda")
SHAPE = (
    {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
     "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 16384}
    if ON_GPU else
    {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
     "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 512}
)  # fmt: skip
TOKENS = (256, 2048, 8192) if ON_GPU else (16, 64)
REPEATS = 5 if ON_GPU else 2
SLACK = 0.15
HALF = 0.6


def config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config(), dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def settle() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


class Bench:
    """The model, its region, and what is measured on them."""

    def __init__(self) -> None:
        began = time.perf_counter()
        self.mem = shoal.MemoryManager(
            DEVICE, device_budget="24GiB" if ON_GPU else "256MiB", host_budget="24GiB" if ON_GPU else "256MiB"
        )
        if ON_GPU:
            self.region = self.mem.region("weights")
            with st.use_region(self.region), torch.device(DEVICE):
                self.model = build()
            self.say(f"built, {st.stats(self.region)}", began)
            began = time.perf_counter()
            self.region.freeze(wait=True, timeout_s=120)
            self.say("frozen, and copied to the host", began)
        else:
            self.model = build()
            self.region = st.place(self.model, self.mem).region
        self.rows: list[Row] = []
        self.failed = 0

    @staticmethod
    def say(what: str, began: float) -> None:
        print(f"{what}: {time.perf_counter() - began:.2f} s", flush=True)

    def prompt(self, tokens: int) -> torch.Tensor:
        made = torch.Generator().manual_seed(tokens)
        return torch.randint(SHAPE["vocab_size"], (1, tokens), generator=made).to(DEVICE if ON_GPU else "cpu")

    def first_token(self, ids: torch.Tensor) -> torch.Tensor:
        """Prefill, with a cache as for decoding; the logits of the last position, on the host."""
        with torch.inference_mode():
            return self.model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1].cpu()

    def timed(self, act: Callable[[], torch.Tensor | object]) -> tuple[float, torch.Tensor | object]:
        settle()
        began = time.perf_counter()
        result = act()
        settle()
        return time.perf_counter() - began, result

    def asleep(self, keep: float = 0.0) -> None:
        self.region.sleep(keep=keep)

    def link(self) -> float | None:
        """Bytes a second of one long copy from page-locked memory of torch's."""
        if not ON_GPU:
            return None
        host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
        into = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
        seconds = [self.timed(lambda: into.copy_(host, non_blocking=True))[0] for _ in range(6)][1:]
        return (1 << 30) / min(seconds)

    def check(self, name: str, got: object, want: torch.Tensor) -> None:
        if not isinstance(got, torch.Tensor) or not torch.equal(got, want):
            print(f"FAILED: {name}: other logits than the model that never slept", flush=True)
            self.failed += 1

    def run(self) -> None:
        began = time.perf_counter()
        attached = st.attach(self.model, self.region)
        self.say(f"attached, {len(attached.blocks)} blocks", began)
        prompts = {tokens: self.prompt(tokens) for tokens in TOKENS}
        want = {tokens: self.first_token(ids) for tokens, ids in prompts.items()}
        for tokens, ids in prompts.items():
            self.check(f"{tokens} again", self.first_token(ids), want[tokens])
        began = time.perf_counter()
        report = self.region.sleep()
        self.say(f"first sleep, {report.copied >> 20} MiB copied", began)
        total = self.region.usage()["total"]
        link = self.link()
        wakes: list[float] = []
        for tokens, ids in prompts.items():
            self.measure(ids, want[tokens], total, link, wakes)
        full = of_samples("wake whole, nothing else", "seconds", wakes, "s", "lower")
        if link is not None:
            full.ceiling = total / link
        self.rows.insert(0, full)
        self.rows.insert(1, Row("bytes of the region", "bytes", total, "B", "higher"))
        self.calls(attached, prompts[TOKENS[0]])

    def measure(
        self, ids: torch.Tensor, want: torch.Tensor, total: int, link: float | None, wakes: list[float]
    ) -> None:
        tokens = ids.shape[1]
        prefill: list[float] = []
        whole: list[float] = []
        ordered: list[float] = []
        half: list[float] = []
        here: list[float] = []
        missing = 0
        for turn in range(REPEATS + 1):
            with self.region.guard():
                seconds, got = self.timed(lambda: self.first_token(ids))
            prefill.append(seconds)
            self.asleep()
            seconds, _ = self.timed(self.region.wake)
            here.append(seconds)
            more, got = self.timed(lambda: self.first_token(ids))
            whole.append(seconds + more)
            self.check(f"{tokens} woken whole", got, want)
            self.asleep()
            seconds, got = self.timed(lambda: self.first_token(ids))
            ordered.append(seconds)
            self.check(f"{tokens} in order", got, want)
            self.asleep(0.5)
            missing = total - self.region.usage()["device"]
            seconds, got = self.timed(lambda: self.first_token(ids))
            half.append(seconds)
            self.check(f"{tokens} from half", got, want)
            if turn == 0:
                # Whatever the first one had to set up.
                for samples in (prefill, whole, ordered, half, here):
                    samples.clear()
        wakes += here
        wake, alone = statistics.median(here), statistics.median(prefill)
        name = f"first token, {tokens} tokens"
        self.rows.append(of_samples(f"{name}: prefill alone", "seconds", prefill, "s", "lower"))
        self.rows.append(of_samples(f"{name}: wake whole, then prefill", "seconds", whole, "s", "lower"))
        peer = statistics.median(whole)
        for case, samples, target, ceiling in (
            ("asleep", ordered, max(wake, alone) + SLACK * min(wake, alone), max(wake, alone)),
            ("half resident", half, HALF * wake, max(alone, missing / link if link else 0.0)),
        ):
            row = of_samples(f"{name}: {case}, woken in order", "seconds", samples, "s", "lower")
            row.ceiling, row.peer, row.peer_value = ceiling, "wake whole, then prefill", peer
            row.target, row.met = target, row.value <= target
            self.rows.append(row)

    def calls(self, attached: st.Attachment, ids: torch.Tensor) -> None:
        """What being attached costs a call while everything is there."""
        self.region.wake()
        one = ids[:, :1]

        def step() -> None:
            with torch.inference_mode():
                self.model(input_ids=one, use_cache=False)

        def median(count: int = 20) -> float:
            return statistics.median(self.timed(step)[0] for _ in range(count))

        with_hooks = median()
        attached.detach()
        without = median()
        row = Row("a step of one token, resident, attached", "seconds", with_hooks, "s", "lower")
        row.peer, row.peer_value = "detached", without
        self.rows.append(row)


def main() -> int:
    torch.set_num_threads(1 if not ON_GPU else 8)
    bench = Bench()
    try:
        bench.run()
    finally:
        if path := os.environ.get("SHOAL_RESULT"):
            save_gpu(Path(path), bench.rows)
        else:
            for row in bench.rows:
                print(row.line())
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
