"""An MCP server that is a program, of the revision of 2025-11-25. Imports nothing of others, so that it starts fast.

Its first argument chooses its manners: `good`; `dies` at a call; `floods` instead of answering a call; `silent` when it is asked
for its tools; `late`, which begins once there is a file `go` beside its notes; `stays`, with a child, although
its input is closed and it was asked to go.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

MANNERS, NOTES = sys.argv[1], sys.argv[2]
TOOL = {"name": "look", "description": "Looks around.", "inputSchema": {"type": "object", "properties": {"what": {"type": "string"}}}}


def note(text: str) -> None:
    with Path(NOTES).open("a") as notes:
        notes.write(text + "\n")


def called(what: str) -> object:
    if MANNERS == "dies" or what == "death":
        os._exit(1)
    if MANNERS == "floods":
        print("x" * 6_000_000, flush=True)
    if what == "for ever":
        return None
    if what == "environment":
        return {"text": json.dumps(dict(os.environ)), "type": "text"}
    return {"text": f"{what} in {os.getpid()}", "type": "text"}


note(f"began {os.getpid()}")
print("Welcome, people.", flush=True)
if MANNERS == "stays":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(f"began {subprocess.Popen(['sleep', '600']).pid}")
while MANNERS == "late" and not (Path(NOTES).parent / "go").exists():
    time.sleep(0.01)
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    answer: dict[str, object] = {"jsonrpc": "2.0", "id": asked["id"]}
    if asked["method"] == "initialize":
        told = {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": {"name": "tests", "version": "1"}}
        answer["result"] = told
    elif asked["method"] == "tools/list":
        note("asked 1")
        if MANNERS == "silent":
            continue
        answer["result"] = {"tools": [TOOL]}
    elif asked["method"] == "tools/call":
        content = called(asked["params"].get("arguments", {}).get("what", ""))
        if content is None:
            continue
        answer["result"] = {"content": [content]}
    else:
        answer["error"] = {"code": -32601, "message": "Method not found"}
    print(json.dumps(answer), flush=True)
note(f"ended {os.getpid()}")
while MANNERS == "stays":
    time.sleep(1)
