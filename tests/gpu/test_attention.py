"""The worker's attention in one kernel, on a GPU: what the plain one gives, and the same whoever is in the batch."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
attention = pytest.importorskip("shoal.worker.attention")

DEVICE = torch.device("cuda:0")
HEADS, KV_HEADS, DIM = 8, 2, 64
SCALE = DIM**-0.5


class Batch:
    """Sequences with queries at the ends of their keys, as a step of continuous batching has them."""

    def __init__(self, lengths: list[tuple[int, int]], seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
        made = [self._of(seed + number, *one, dtype) for number, one in enumerate(lengths)]
        self.query = torch.cat([one[0] for one in made]).transpose(0, 1).unsqueeze(0)
        self.key, self.value = (torch.cat([one[which] for one in made]) for which in (1, 2))
        self.ends = tuple(
            [sum(one[which] for one in lengths[:number]) for number in range(len(lengths) + 1)] for which in (0, 1)
        )
        self.cumulated = tuple(torch.tensor(one, dtype=torch.int32, device=DEVICE) for one in self.ends)

    @staticmethod
    def _of(seed: int, queries: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
        made = torch.Generator(DEVICE).manual_seed(seed)
        shapes = ((queries, HEADS, DIM), (keys, KV_HEADS, DIM), (keys, KV_HEADS, DIM))
        return [torch.randn(*shape, generator=made, device=DEVICE).to(dtype) for shape in shapes]

    def packed(self, window: int = 1) -> torch.Tensor:
        return attention.packed(self.query, self.key, self.value, self.cumulated, self.ends, window, SCALE)

    def plain(self, window: int = 1) -> torch.Tensor:
        """The other way, in twice the precision of what is stored."""
        wide = (one.float() for one in (self.query, self.key, self.value))
        return attention.one_by_one(*wide, self.ends, window, SCALE)


def lengths(chance: random.Random, *, decode: bool) -> list[tuple[int, int]]:
    found = []
    for _ in range(chance.randrange(1, 9)):
        keys = chance.choice([1, 2, 15, 16, 17, 100, 500, 1300])
        found.append((1 if decode else chance.randrange(1, keys + 1), keys))
    return found


@pytest.mark.parametrize("window", [1, 8, 128, 4096])
@pytest.mark.parametrize("decode", [False, True])
def test_one_kernel_gives_what_each_sequence_gives_by_itself(window: int, decode: bool) -> None:
    chance = random.Random(window)
    for seed in range(12):
        batch = Batch(lengths(chance, decode=decode), seed)
        found, wanted = batch.packed(window), batch.plain(window)
        assert found.shape == wanted.shape
        off = (found.float() - wanted).abs().max().item()
        assert off < 2e-2, f"off by {off} with {batch.ends}"  # bfloat16 has eight bits


def test_a_sequence_is_the_same_to_the_bit_whoever_its_neighbours_are() -> None:
    chance = random.Random(5)
    alone = Batch([(1, 700)], 40).packed()
    for seed in range(12):
        others = lengths(chance, decode=chance.random() < 0.5)
        # The first is made of the same seed as the one alone.
        batch = Batch([(1, 700), *others], 40)
        assert torch.equal(batch.packed()[:, :1], alone), (seed, others)


def test_both_ways_are_taken_where_they_are_to_be() -> None:
    assert attention._is_fast(DEVICE, torch.bfloat16, 128)
    assert attention._is_fast(DEVICE, torch.float16, 256)
    assert not attention._is_fast(DEVICE, torch.float32, 128), "plain generate() is matched to the bit there"
    assert not attention._is_fast(DEVICE, torch.bfloat16, 512)
    assert not attention._is_fast(torch.device("cpu"), torch.bfloat16, 128)
