"""Shoal's worker with vLLM's own KV offloading: vLLM 0.26's whole engine, with a model and copies that need no GPU.

Skipped where vLLM 0.26 cannot be imported. `tests/vllm/on_cpu.py` is what runs.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

try:
    VERSION = importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    VERSION = ""
pytestmark = pytest.mark.skipif(
    not VERSION.startswith("0.26."),
    reason=f"needs vLLM 0.26, and there is {VERSION or 'none'} (pip install 'shoal[vllm]')",
)

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 192,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 257,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "dtype": "float32", "tie_word_embeddings": True,
    "hidden_act": "silu",
}  # fmt: skip
SPECS: dict[str, dict[str, Any]] = {
    "staging alone": {"cpu_bytes_to_use": 24 << 20, "spec_name": "TieringOffloadingSpec"},
    "Shoal's tiers": {
        "cpu_bytes_to_use": 24 << 20, "spec_name": "ShoalOffloadingSpec", "spec_module_path": "shoal.vllm.offloading",
        "host": "64MiB",
    },
}  # fmt: skip


def run(folder: Path, connector: dict[str, Any]) -> tuple[int, dict[str, Any], str]:
    """Run an engine in a process of its own; give its exit status, what it found, and what it said."""
    from tests.vllm import on_cpu

    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    on_cpu.found_by_vllm(folder / "site")
    env = {
        **os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "python"), str(ROOT), str(folder / "site"), os.environ.get("PYTHONPATH", "")]
        ),
    }  # fmt: skip
    out = folder / "found.json"
    ran = subprocess.run(
        [sys.executable, "-m", "tests.vllm.on_cpu", str(folder / "model"), json.dumps(connector), str(out)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    return ran.returncode, json.loads(out.read_text()) if out.exists() else {}, ran.stdout + ran.stderr


@pytest.mark.parametrize("name", SPECS)
def test_answers_are_the_same_while_blocks_come_and_go_with_a_connector(tmp_path: Path, name: str) -> None:
    connector = {
        "kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": SPECS[name],
    }  # fmt: skip
    status, found, said = run(tmp_path, connector)
    assert status == 0, said[-4000:]
    rounds = {what: one for what, one in found.items() if isinstance(one, dict)}
    assert len(rounds) >= 14
    assert {what: one["wrong"] for what, one in rounds.items() if one["wrong"]} == {}
    assert rounds["under a limit"]["kv"] <= 16 << 20
    for turn in range(2):
        what = f"ended and forgotten, {turn}"
        to_read, kept_back = found[f"{what}: kept back"]
        assert to_read == kept_back > 0, "blocks that are still to be stored lost their memory"
        assert rounds[f"{what}, gone on again"]["found"] > rounds[f"{what}, gone on"]["found"], (
            "what was stored after its request had ended is not found"
        )
    from_tiers = [one["found"] for what, one in rounds.items() if what.startswith("forgotten, staging too: True")]
    assert all(from_tiers) if name == "Shoal's tiers" else len(from_tiers) == 2
    # The first block of all is vLLM's null block, and the last request's is let go with the next step. How much memory
    # the two keep depends on how long the pieces are that they lie in; none is kept for nothing.
    assert found["kept back"] <= 1
    blocks, empty = found["left"]
    assert 1 <= blocks <= 2
    assert empty == 0


def test_a_connector_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    status, _, said = run(tmp_path, {"kv_connector": "ExampleConnector", "kv_role": "kv_both"})
    assert status != 0
    assert "OffloadingConnector or ShoalConnector as kv_connector" in said
