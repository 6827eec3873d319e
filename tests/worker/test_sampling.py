"""Sampling row by row: greedy untouched, draws that follow the softmax, draws that repeat."""

from __future__ import annotations

import torch

from shoal.worker.sampling import Sampling, adjust


def draws(scores, count, **options):
    return [int(adjust(scores, Sampling(seed=seed, **options), []).argmax()) for seed in range(count)]


def test_greedy_is_untouched():
    scores = torch.randn(50)
    assert adjust(scores, Sampling(temperature=0.0), [1, 2]) is scores


def test_draws_follow_the_softmax():
    scores = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    for temperature in (1.0, 0.5):
        expected = torch.softmax(scores / temperature, 0)
        counts = torch.bincount(torch.tensor(draws(scores, 4000, temperature=temperature)), minlength=4) / 4000
        assert (counts - expected).abs().max() < 0.03


def test_top_k_and_top_p_keep_the_likeliest():
    scores = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert set(draws(scores, 300, top_k=2)) == {0, 1}
    assert set(draws(scores, 300, top_p=0.79)) == {0, 1}
    assert set(draws(scores, 300, top_p=0.81)) == {0, 1, 2}
    assert set(draws(scores, 50, top_p=0.0)) == {0}


def test_penalties_and_biases():
    scores = torch.tensor([2.0, 1.5, 1.0])
    greedy = {"temperature": 0.0}
    assert adjust(scores, Sampling(**greedy, presence_penalty=1.0), [0]).tolist() == [1.0, 1.5, 1.0]
    assert adjust(scores, Sampling(**greedy, frequency_penalty=0.5), [0, 0, 1]).tolist() == [1.0, 1.0, 1.0]
    assert adjust(scores, Sampling(**greedy, logit_bias={2: 5.0}), []).tolist() == [2.0, 1.5, 6.0]
    assert scores.tolist() == [2.0, 1.5, 1.0], "the logits themselves stay"


def test_a_draw_depends_on_the_seed_and_the_position_alone():
    scores = torch.randn(100, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(seed=9)
    assert torch.equal(adjust(scores, sampling, [1, 2]), adjust(scores, sampling, [3, 4]))
    assert not torch.equal(adjust(scores, sampling, [1]), adjust(scores, sampling, [1, 2]))
