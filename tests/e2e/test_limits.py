"""What a model can never hold is refused at once, by the server's budget and by the model's own `max`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.server import serve

MIB = 1 << 20
KV = 4 * MIB  # room for 448 tokens beside the padding


@pytest.mark.parametrize(("named", "words"), [("max", "the model's max"), ("device_budget", "the device's budget")])
def test_a_request_that_can_never_fit_is_refused_at_once(
    tmp_path: Path, model_tables: list[dict[str, Any]], named: str, words: str
) -> None:
    size = sum(file.stat().st_size for file in Path(model_tables[0]["source"]).glob("*.safetensors"))
    room = -(-size // (2 * MIB)) * 2 * MIB + KV
    table = model_tables[0] | ({"max": room} if named == "max" else {})
    budget = f"{room}B" if named == "device_budget" else "256MiB"
    with serve(tmp_path, models=[table], device_budget=budget) as server:
        name = str(table["name"])
        server.wait_for(name, "asleep")
        ask = {"model": name, "prompt": "x" * 100, "temperature": 0}
        started = time.monotonic()
        refused = server.http.post("/v1/completions", json=ask | {"max_tokens": 380})
        assert time.monotonic() - started < 20, "it was waited for memory that cannot come"
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert words in error["message"]
        assert f"{room} bytes, {KV} are left" in error["message"]
        assert server.http.post("/v1/completions", json=ask | {"max_tokens": 100}).status_code == 200
