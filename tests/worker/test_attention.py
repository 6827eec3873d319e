"""Where the worker's attention is one kernel, and where it is not; the kernel itself is tested on a GPU (tests/gpu)."""

from __future__ import annotations

import importlib.util
import sys

import pytest

torch = pytest.importorskip("torch")
attention = pytest.importorskip("shoal.worker.attention")


def loaded_anew():
    """Load the module under another name, as it is with what can be imported now."""
    spec = importlib.util.spec_from_file_location("attention_anew", attention.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_torch_without_the_kernel_goes_sequence_by_sequence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    anew = loaded_anew()
    assert anew.KERNEL is None
    assert not anew._is_fast(torch.device("cuda:0"), torch.bfloat16, 128)


def test_a_kernel_that_knows_no_windows_is_not_taken(monkeypatch):
    anew = loaded_anew()
    monkeypatch.setattr(anew, "KERNEL", lambda query, key, value, *, is_causal=False: query)
    assert not anew._is_fast(torch.device("cuda:0"), torch.bfloat16, 128)


def test_the_torch_that_is_installed_has_the_kernel():
    assert attention._has_windows(attention.KERNEL)
    assert not attention._is_fast(torch.device("cpu"), torch.bfloat16, 128)
