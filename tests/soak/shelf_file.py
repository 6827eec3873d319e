"""The demo shelf as a soak serves it, and how its file is changed under the running server."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.server import toml_value

if TYPE_CHECKING:
    import random

SHELF = Path(__file__).resolve().parents[2] / "examples" / "shelf.toml"
EXTRA = "extra"
"""A fourth model, the code model again, which comes and goes."""
WAIT_S_MAX = 60
PARKED_MAX = 24
ORPHAN_S_MAX = 8

# What a model's file may say, and whether its worker has to be started anew for it.
CHOICES: dict[str, list[tuple[str, list[Any]]]] = {
    "chat": [("priority", [0, 1, 3]), ("keep_alive", [None, "3s", "20s"]), ("max", [None, "539MiB"])],
    "documents": [("priority", [0, 2]), ("preload", [False, True]), ("keep_alive", [None, "2s"])],
    "code": [
        ("priority", [0, 5]), ("min", [None, "2MiB"]), ("context", [512, 480]), ("max", [None, "64MiB"]),
        ("prefix_caching", [True, False]),
    ],
    EXTRA: [("priority", [0, 1]), ("keep_alive", [None, "1s"]), ("preload", [False, True])],
}  # fmt: skip


class ShelfFile:
    """The file's content and its changes; every draw is from the dice that are given."""

    def __init__(self, path: Path, port: int) -> None:
        self.path = path
        text = tomllib.loads(SHELF.read_text("utf-8"))
        self.server: dict[str, Any] = text["server"] | {
            "listen": f"127.0.0.1:{port}",
            "quantum": "1s",
            "wait_s_max": WAIT_S_MAX,
            "parked_max": PARKED_MAX,
            "orphan_s_max": ORPHAN_S_MAX,
            # Soon full: memory that fills up with KV is not to be taken for memory that is lost.
            "host_tier": "64MiB",
        }
        code = next(table for table in text["model"] if table["name"] == "code")
        self.models: dict[str, dict[str, Any]] = {table["name"]: dict(table) for table in text["model"]}
        self.models[EXTRA] = code | {"name": EXTRA}
        self.has_extra = True
        self.write()

    def write(self, wrong: str = "") -> None:
        """Write it as it stands, with a wrong line at its end or without."""
        lines = ["[server]", *(f"{key} = {toml_value(value)}" for key, value in self.server.items())]
        for name, model in self.models.items():
            if name != EXTRA or self.has_extra:
                lines += ["", "[[model]]"]
                lines += [f"{key} = {toml_value(value)}" for key, value in model.items() if value is not None]
        self.path.write_text("\n".join([*lines, wrong]) + "\n")

    def change(self, dice: random.Random) -> str:
        """Change one thing, write the file, and say what it was."""
        what = dice.choice(["extra", "quantum", "model", "model", "model"])
        if what == "extra":
            self.has_extra = not self.has_extra
            said = f"{EXTRA} {'comes' if self.has_extra else 'goes'}"
        elif what == "quantum":
            self.server["quantum"] = dice.choice(["500ms", "1s", "3s"])
            said = f"quantum {self.server['quantum']}"
        else:
            name = dice.choice(list(CHOICES))
            key, values = dice.choice(CHOICES[name])
            value = dice.choice([value for value in values if value != self.models[name].get(key)])
            self.models[name][key] = value
            said = f"{name}'s {key} {value}"
        self.write()
        return said
