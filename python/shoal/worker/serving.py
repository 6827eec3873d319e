"""From a loaded model to an engine and what the HTTP side needs of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .engine_causal import CausalEngine
from .engine_embedding import EmbeddingEngine, Pooling
from .errors import LoadError
from .http import Served
from .kv import KvLayout
from .limits import CausalLimits, Room
from .parsing import SamplingDefaults

if TYPE_CHECKING:
    from .loading import LoadedModel
    from .memory import Memory
    from .spec import WorkerSpec


@dataclass(frozen=True)
class Assembled:
    """A model with its engine, not started yet.

    Attributes
    ----------
    capabilities
        What the server is told in `Ready`.
    """

    served: Served
    engine: CausalEngine | EmbeddingEngine
    capabilities: dict[str, Any]
    memory: Memory


def assemble(name: str, loaded: LoadedModel, memory: Memory, spec: WorkerSpec, weights_bytes: int) -> Assembled:
    """Build the engine of a model whose weights are placed.

    Raises
    ------
    LoadError
        The specification leaves the model no room.
    """
    model, files = loaded.model, loaded.files
    causal: CausalEngine | None = None
    embedding: EmbeddingEngine | None = None
    kv: dict[str, int] = {"kv_block_bytes": 0, "kv_bytes_min": 0, "kv_block_tokens": 0}
    if files.kind == "causal":
        layout = KvLayout.of(model.config.get_text_config(), model.dtype, spec.block_tokens)
        try:
            room = Room.of(spec, weights_bytes, memory.overhead_peak() or 0)
            limits = CausalLimits.of(layout, loaded.context_tokens, spec, room)
        except ValueError as error:
            raise LoadError("model_unsupported", f"{files.path}: {error}") from error
        causal = CausalEngine(model, memory, spec, limits, loaded.eos)
        context = limits.context_tokens
        kv = {
            "kv_block_bytes": limits.block_bytes,
            "kv_bytes_min": limits.kv_bytes_min,
            "kv_block_tokens": limits.block_tokens,
        }
    else:
        context = min(loaded.context_tokens, spec.context or loaded.context_tokens)
        embedding = EmbeddingEngine(model, memory, spec, files.pooling or Pooling(), context)
    served = Served(
        name=name,
        tokenizer=loaded.tokenizer,
        vocabulary=model.config.get_text_config().vocab_size,
        created=int(time.time()),
        causal=causal,
        embedding=embedding,
        defaults=_sampling_defaults(loaded.generation_config),
        body_bytes_max=spec.body_bytes_max,
    )
    capabilities = {
        "routes": served.routes,
        "context_tokens": context,
        "weights_bytes": weights_bytes,
        "dtype": str(model.dtype).removeprefix("torch."),
        **kv,
    }
    engine = causal or embedding
    assert engine is not None
    return Assembled(served, engine, capabilities, memory)


def _sampling_defaults(config: dict[str, Any]) -> SamplingDefaults:
    """Take what the model's authors recommend, else OpenAI's defaults."""

    def number(name: str, default: float) -> float:
        value = config.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default

    return SamplingDefaults(
        temperature=min(number("temperature", 1.0), 2.0),
        top_p=min(number("top_p", 1.0), 1.0),
        top_k=int(number("top_k", 0)) if config.get("do_sample") else 0,
    )
