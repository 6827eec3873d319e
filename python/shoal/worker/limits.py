"""How long a request may be: by what the model was trained for, by its KV cache, and by the memory it can ever have.

Apart, because a request that can never fit is refused at once, with the numbers, instead of waiting for memory that
nobody can free for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .errors import ApiError
from .kv import PADDING_BLOCKS

if TYPE_CHECKING:
    from .kv import KvLayout
    from .spec import WorkerSpec

_KV_DEFAULT_MAX = 1 << 30
_CONTEXTS_DEFAULT = 4
_PAGE_BYTES = 2 << 20
_SPARE_BLOCKS = 2  # in each group, the scheduler takes up to so many blocks more than a request's tokens need


@dataclass(frozen=True)
class Room:
    """The device memory that a model can have when nobody else has any.

    Attributes
    ----------
    bytes
        For all kinds together.
    named
        What sets it, in words: ``"the device's budget"`` or ``"the model's max"``.
    weights, overhead
        What of it is not for the KV cache, in bytes.
    """

    bytes: int
    named: str
    weights: int
    overhead: int

    @classmethod
    def of(cls, spec: WorkerSpec, weights: int, overhead: int = 0) -> Room | None:
        """Give what the specification says; None where it sets no limit."""
        limits = [(spec.device_bytes, "the device's budget"), (spec.device_bytes_max, "the model's max")]
        known = [(size, named) for size, named in limits if size is not None]
        if not known:
            return None
        size, named = min(known)
        overhead = max(overhead, spec.overhead_bytes) if spec.on_gpu else overhead
        return cls(size, named, -(-weights // _PAGE_BYTES) * _PAGE_BYTES, overhead)

    @property
    def kv(self) -> int:
        """Bytes for the KV cache."""
        return max(0, self.bytes - self.weights - self.overhead)


@dataclass(frozen=True)
class CausalLimits:
    """What fits.

    Attributes
    ----------
    context_tokens
        Longest prompt plus answer.
    blocks
        KV blocks that requests may use (padding is beside them).
    own_tokens
        What `context_tokens` were if device memory had no end.
    room
        The device memory there is, if that has an end.
    """

    context_tokens: int
    blocks: int
    layout: KvLayout
    own_tokens: int
    room: Room | None = None

    @classmethod
    def of(cls, layout: KvLayout, model_context: int, spec: WorkerSpec, room: Room | None = None) -> CausalLimits:
        """Fit the context into the KV space that the specification allows, and into the device memory there is."""
        context = min(model_context, spec.context or model_context)
        tokens = layout.block_tokens
        wanted = _CONTEXTS_DEFAULT * (-(-context // tokens) + _SPARE_BLOCKS) * layout.groups
        default = min(wanted * layout.block_bytes, _KV_DEFAULT_MAX)
        blocks = (spec.kv_max_bytes or default) // layout.block_bytes - PADDING_BLOCKS
        if blocks < 3 * layout.groups:
            need = (3 * layout.groups + PADDING_BLOCKS) * layout.block_bytes
            has = (
                f"kv_max_bytes is {spec.kv_max_bytes}"
                if spec.kv_max_bytes
                else f"its KV cache may take {default} bytes"
            )
            raise ValueError(f"{has}; the least for this model is {need}")
        own = min(context, (blocks // layout.groups - _SPARE_BLOCKS) * tokens)
        return cls(own, blocks, layout, own)._within(room)

    def with_overhead(self, overhead: int) -> CausalLimits:
        """Give the limits when the process takes so many bytes beside its regions, if that is more than was thought."""
        if self.room is None or overhead <= self.room.overhead:
            return self
        return self._within(replace(self.room, overhead=overhead))

    def _within(self, room: Room | None) -> CausalLimits:
        """Give the limits in this room; at least one token, with which nothing can be asked."""
        context = self.own_tokens
        if room is not None and self.kv_bytes(context) > room.kv:
            low, high = 1, context  # `high` does not fit
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self.kv_bytes(middle) <= room.kv else (low, middle)
            context = low
        return replace(self, context_tokens=context, room=room)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.layout.block_bytes

    @property
    def block_tokens(self) -> int:
        """Tokens of one block."""
        return self.layout.block_tokens

    @property
    def kv_bytes_min(self) -> int:
        """KV bytes with which one short request runs."""
        return self._pages_bytes(2 * self.layout.groups)

    def kv_bytes(self, tokens: int) -> int:
        """Device bytes that the KV cache takes for one request of so many tokens, alone."""
        return self._pages_bytes(self.layout.request_blocks(-(-tokens // self.block_tokens) + _SPARE_BLOCKS))

    def _pages_bytes(self, blocks: int) -> int:
        """Count the bytes of the pages under so many blocks and the padding beside them."""
        return -(-(blocks + PADDING_BLOCKS) * self.block_bytes // _PAGE_BYTES) * _PAGE_BYTES

    def check(self, prompt: int, answer: int | None, param: str = "prompt") -> int:
        """Give how many tokens the answer may have; None asks for all there is room for.

        Raises
        ------
        ApiError
            Prompt and answer together can never fit.
        """
        left = self.context_tokens - prompt
        if left < 1 or (answer or 1) > left:
            raise self._refusal(prompt, answer or 1, param)
        return answer or left

    def _refusal(self, prompt: int, answer: int, param: str) -> ApiError:
        """Give OpenAI's error for what does not fit, with the numbers."""
        total, room, why = prompt + answer, self.room, ""
        if room is not None and total <= self.own_tokens:
            why = (
                f" here, where device memory sets it (the model's own is {self.own_tokens}): {total} tokens need "
                f"{self.kv_bytes(total)} bytes of KV cache, and of {room.named}, {room.bytes} bytes, {room.kv} are "
                f"left beside {room.weights} of weights and {room.overhead} of overhead"
            )
        return ApiError(
            f"This model's maximum context length is {self.context_tokens} tokens{why}. However, you requested "
            f"{total} tokens ({prompt} in the prompt, {answer} in the completion). Please reduce the length of the "
            "prompt or completion.",
            param=param,
            code="context_length_exceeded",
        )
