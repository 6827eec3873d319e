"""Stands in for vLLM 0.26 in tests: the seams that this package uses, over an engine small enough to be read.

Tokens are bytes. A block of the KV cache holds sixteen of them in each layer, and the next token follows from all that
the cache holds of a request and from the weights: what was lost or mixed up in either shows in the answer.
"""

from types import SimpleNamespace

__version__ = "0.26.0"


class SamplingParams(SimpleNamespace):
    pass
