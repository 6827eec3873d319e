#!/usr/bin/env python3
"""The process of a policy as far as a test needs: `fake_policy.py -m shoal.policy NAME --path DIRECTORY`.

It stands in for an interpreter. It says on standard error who it is, writes the number of each question to
`DIRECTORY/asked`, and plans nothing. The file `DIRECTORY/code`, where there is one, is its code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NAME, DIRECTORY = sys.argv[sys.argv.index("shoal.policy") + 1], Path(sys.argv[sys.argv.index("--path") + 1])

code = DIRECTORY / "code"
if code.exists() and code.read_text() == "broken":
    print(json.dumps({"error": "the code is broken"}), flush=True)
    sys.exit(2)
print(f"policy {NAME} starts", file=sys.stderr, flush=True)
print(json.dumps({"files": [str(code)]} if code.exists() else {}), flush=True)
for line in sys.stdin:
    number = json.loads(line)["question"]
    with (DIRECTORY / "asked").open("a") as asked:
        asked.write(f"{number}\n")
    print(json.dumps({"question": number, "plan": {"actions": [], "again_at_ms": None}}), flush=True)
