"""What people get wrong, and what they are told."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.server import Server, environment, free_port, serve, write_config

from shoal.demo.shelf import MODELS

# Even root may then write only what its permissions say: drop CAP_DAC_OVERRIDE for good (PR_CAPBSET_DROP), then go on.
MORTAL = """
import ctypes, os, sys
if os.geteuid() == 0:
    assert ctypes.CDLL(None, use_errno=True).prctl(24, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execv(sys.argv[1], sys.argv[1:])
"""


def refused(home: Path, server: dict[str, object], models: list[dict[str, object]]) -> str:
    """Start a server that must refuse to start; gives what it said."""
    config = write_config(home, {"listen": f"127.0.0.1:{free_port()}", "device": "sim", **server}, models)
    return refused_file(home, config)


def refused_file(home: Path, config: Path) -> str:
    """The same for a written file."""
    run = subprocess.run(
        [sys.executable, "-c", MORTAL, sys.executable, "-m", "shoal", "serve", str(config)],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode not in {0, -6, -11}, f"status {run.returncode}: {run.stderr}"
    assert "panicked" not in run.stderr, run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    return run.stdout + run.stderr


def test_configuration(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """Mistakes in the file are named with the nearest right word, before anything starts."""
    said = refused(tmp_path, {"devise_budget": "1GiB"}, model_tables)
    assert "devise_budget" in said
    assert "device_budget" in said
    assert "shoal.toml" in said
    said = refused(tmp_path, {}, [{**model_tables[0], "pinn": True}])
    assert "pinn" in said
    assert "pin" in said
    said = refused(tmp_path, {}, [model_tables[0], model_tables[0]])
    assert str(model_tables[0]["name"]) in said
    said = refused(tmp_path, {"device_budget": "much"}, model_tables)
    assert "much" in said
    said = refused_file(tmp_path, tmp_path / "nowhere.toml")
    assert "nowhere.toml" in said


def test_models_of_the_demo_are_known_before_anything_starts(tmp_path: Path) -> None:
    """A name that the demo does not have is told with those it has; one that it has is not prepared here."""
    models: list[dict[str, object]] = [{"name": "poem", "source": "demo:poem"}]
    models += [{"name": name, "source": f"demo:{name}"} for name in MODELS]
    config = write_config(tmp_path, {"device": "sim"}, models)
    run = subprocess.run(
        [sys.executable, "-m", "shoal", "serve", "--check", str(config)],
        env=environment(tmp_path) | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 2
    assert f'the demo has no model "poem"; it has {", ".join(MODELS)}' in run.stderr
    for name in MODELS:
        assert f'the demo\'s model "{name}" is not prepared yet' in run.stderr


def test_port_in_use(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """Somebody else listens there already."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in refused(tmp_path, {"listen": f"127.0.0.1:{port}"}, model_tables[:1])


def test_not_loopback_without_keys(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """An open address needs keys."""
    assert "api_key_file" in refused(tmp_path, {"listen": f"0.0.0.0:{free_port()}"}, model_tables[:1])


@pytest.mark.parametrize("directory", ["run", "state"])
def test_no_permission_to_write(tmp_path: Path, model_tables: list[dict[str, object]], directory: str) -> None:
    """A directory that the server needs may not be written."""
    (tmp_path / directory).mkdir(mode=0o500)
    said = refused(tmp_path, {}, model_tables[:1])
    assert str(tmp_path / directory) in said, said
    assert "denied" in said.lower(), said
    assert not list((tmp_path / directory).iterdir())


def test_runtime_directory_that_cannot_be_made(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """A file stands where the runtime directory would be."""
    environment(tmp_path)
    (tmp_path / "run" / "shoal").write_text("in the way")
    assert "shoal" in refused(tmp_path, {}, model_tables[:1])


def broken_models(root: Path, good: Path) -> dict[str, Path]:
    """Directories that look like models and are not."""
    cases = {"missing": root / "no-such-directory"}
    for name in ("truncated", "corrupt", "unsupported", "pickled"):
        cases[name] = root / name
        shutil.copytree(good, cases[name])
    weights = cases["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    weights = cases["corrupt"] / "model.safetensors"
    weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])
    config = json.loads((cases["unsupported"] / "config.json").read_text())
    config |= {"architectures": ["NoSuchModel"], "model_type": "no-such-type"}
    (cases["unsupported"] / "config.json").write_text(json.dumps(config))
    (cases["pickled"] / "model.safetensors").rename(cases["pickled"] / "pytorch_model.bin")
    return cases


def test_models_that_cannot_be_served(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """Each says why in its state and to its clients, and the good one beside them works."""
    cases = broken_models(tmp_path / "broken", Path(str(model_tables[0]["source"])))
    tables = [{**model_tables[0], "name": name, "source": str(path)} for name, path in cases.items()]
    with serve(tmp_path, models=[model_tables[0], *tables], device_budget="64MiB") as server:
        good = str(model_tables[0]["name"])
        for name, path in cases.items():
            model = server.wait_for(name, "failed")
            assert str(path) in model["error"] or path.name in model["error"], model["error"]
            answer = server.http.post("/v1/completions", json={"model": name, "prompt": "a"})
            assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE, answer.text
            assert answer.json()["error"]["message"]
        assert server.complete(good, "a", 4)


def test_a_budget_too_small(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """Says how many bytes are needed."""
    with serve(tmp_path, models=model_tables[:1], device_budget="8MiB") as server:
        model = server.wait_for(str(model_tables[0]["name"]), "failed")
        assert "8 MiB" in model["error"], model["error"]
        assert "MiB" in model["error"].replace("8 MiB", ""), model["error"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, shelf_models: dict[str, Path]) -> Any:
    """One server for all bad requests."""
    table: dict[str, object] = {"name": "ash", "source": str(shelf_models["ash"]), "dtype": "float32", "context": 512}
    with serve(tmp_path_factory.mktemp("bad"), models=[table], device_budget="64MiB") as server:
        server.wait_for("ash", "asleep")
        yield server


BAD_REQUESTS = [
    ("completions", b"{not json", 400, "JSON"),
    ("completions", b"[]", 400, ""),
    ("completions", b'{"prompt": "a"}', 400, "model"),
    ("completions", b'{"model": 7, "prompt": "a"}', 400, "model"),
    ("completions", b'{"model": "oak", "prompt": "a"}', 404, "ash"),
    ("completions", b'{"model": "ash"}', 400, "prompt"),
    ("completions", b'{"model": "ash", "prompt": {"a": 1}}', 400, "prompt"),
    ("completions", b'{"model": "ash", "prompt": "a", "max_tokens": "many"}', 400, "max_tokens"),
    ("completions", b'{"model": "ash", "prompt": "a", "max_tokens": -1}', 400, "max_tokens"),
    ("completions", b'{"model": "ash", "prompt": "a", "temperature": "hot"}', 400, "temperature"),
    ("chat/completions", b'{"model": "ash", "messages": "hello"}', 400, "messages"),
    ("chat/completions", b'{"model": "ash", "messages": []}', 400, "messages"),
    ("completions", json.dumps({"model": "ash", "prompt": "a" * 2000}).encode(), 400, "512"),
    ("completions", json.dumps({"model": "ash", "prompt": "a", "user": "x" * (33 << 20)}).encode(), 413, ""),
    ("no/such/route", b'{"model": "ash"}', 404, ""),
]


@pytest.mark.parametrize(("route", "body", "status", "word"), BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
def test_requests(running: Server, route: str, body: bytes, status: int, word: str) -> None:
    """Each is answered clearly in OpenAI's form, and the next right request works."""
    answer = running.http.post(f"/v1/{route}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text[:500]
    assert word in answer.json()["error"]["message"], answer.text[:500]
    assert running.complete("ash", "a", 2)


def test_orders(running: Server) -> None:
    """The managing API is as strict: types, names, media types, foreign pages."""
    assert running.order("oak", "wake").status_code == httpx.codes.NOT_FOUND
    assert running.order("ash", "sleep", keep="half").status_code in {400, 422}
    assert running.order("ash", "sleep", keep=1.5).status_code in {400, 422}
    form = running.http.post("/api/v1/models/ash/wake", content=b"a=1", headers={"content-type": "text/plain"})
    assert form.status_code == httpx.codes.UNSUPPORTED_MEDIA_TYPE
    foreign = running.http.post("/api/v1/models/ash/wake", json={}, headers={"origin": "http://elsewhere.example"})
    assert foreign.status_code == httpx.codes.FORBIDDEN
    rebound = running.http.get("/api/v1/state", headers={"host": "elsewhere.example"})
    assert rebound.status_code in {403, 421}
