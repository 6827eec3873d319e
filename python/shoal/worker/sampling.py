"""How the next token is chosen, for each request by itself.

transformers samples a whole batch in one way with one random generator. Here every row of a batch follows its own
request: temperature, top-p, top-k, penalties, biases and a seed. The engine always takes the argmax; a row that samples
is perturbed beforehand with Gumbel noise, which makes the argmax a draw from the softmax. A greedy row passes through
untouched, so greedy stays exact whatever its neighbours do. The noise of token `i` comes from (seed, i) alone: neither
the batch nor a preemption changes a draw.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from .logprobs import TokenLogprob

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

_SEED_MODULUS = 2**63 - 1
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so distinct tokens of one seed get distinct generators


@dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens; temperature 0 is greedy.

    Attributes
    ----------
    logprobs
        With how many alternatives it is told how likely each token was; None tells nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the argmax of the raw logits is the answer."""
        return (
            self.temperature == 0.0
            and self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
            and not self.logit_bias
        )


def generated_tokens(state: RequestState) -> list[int]:
    """Give all tokens a request has generated, also those that a preemption turned into its prompt."""
    if state._true_initial_tokens:
        return state.initial_tokens[state._true_initial_tokens :] + state.generated_tokens
    return state.generated_tokens


def adjust(scores: torch.Tensor, sampling: Sampling, generated: list[int]) -> torch.Tensor:
    """Give scores whose argmax is the next token.

    Parameters
    ----------
    scores
        Logits of one row, float32, shape [vocabulary].
    sampling
        What the request asked for.
    generated
        Its tokens so far.
    """
    if sampling.is_plain_greedy:
        return scores
    scores = scores.clone()
    if sampling.logit_bias:
        for token, bias in sampling.logit_bias.items():
            scores[token] += bias
    if generated and (sampling.presence_penalty or sampling.frequency_penalty):
        tokens, counts = torch.tensor(generated, device=scores.device).unique(return_counts=True)
        scores[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts.to(scores.dtype)
    if sampling.temperature == 0.0:
        return scores
    scores /= sampling.temperature
    if 0 < sampling.top_k < scores.numel():
        threshold = torch.topk(scores, sampling.top_k).values[-1]
        scores.masked_fill_(scores < threshold, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = torch.sort(scores, descending=True)
        probability = ordered.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability
        scores[order[before >= sampling.top_p]] = -torch.inf  # `before` of the first is 0: one always stays
    generator = torch.Generator(device="cpu")
    generator.manual_seed((sampling.seed + len(generated) * _SEED_STEP) % _SEED_MODULUS)
    exponential = torch.empty(scores.shape, dtype=torch.float32).exponential_(generator=generator)
    return scores - exponential.clamp_min_(1e-30).log_().to(scores.device)


class RowSampler(ContinuousBatchingLogitsProcessor):
    """Adjusts each row of a batch by its own request (transformers' per-request processor interface)."""

    supported_kwargs: ClassVar[dict[str, type]] = {"sampling": Sampling}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._rows: list[tuple[str, Sampling, list[int]]] = []
        self._likely: dict[str, torch.Tensor] = {}  # of the last step, for those who want to know

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """There is no tensor argument; transformers wants the storage filled."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        """Remember whose rows the next call sees, in order."""
        self._rows = [
            (
                request.state.request_id,
                request.state.logit_processor_kwargs["sampling"],
                list(generated_tokens(request.state)),
            )
            for request in requests_with_new_token
        ]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> Any:
        """Adjust the rows that belong to requests; what follows them in the batch is not read."""
        del tensor_arg
        self._likely.clear()
        for row, (name, sampling, generated) in enumerate(self._rows):
            if sampling.logprobs is not None:
                self._likely[name] = scores[row].float().log_softmax(dim=-1)
            if not sampling.is_plain_greedy:
                scores[row] = adjust(scores[row], sampling, generated)
        return scores

    def tell(self, name: str, token: int, count: int) -> TokenLogprob | None:
        """Tell how likely the token was that a request got in the last step; once."""
        row = self._likely.pop(name, None)
        return None if row is None else TokenLogprob.of(row, token, count)
