"""Runs a server of this folder as a process of its own, and speaks with it about itself."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class RunningServer:
    """`url` is where it listens; /stats, /reset and /faults are the server's own paths."""

    def __init__(self, port: int, process: subprocess.Popen):
        self.url, self.process = f"http://127.0.0.1:{port}", process

    def stats(self) -> dict[str, Any]:
        return self._ask("/stats", None)

    def reset(self, *, jobs: bool) -> None:
        """Forgets what was counted, and the batch jobs where `jobs` is true; rules stay."""
        self._ask("/reset", {"jobs": jobs})

    def faults(self, *rules: dict[str, Any], seed: int = 0) -> None:
        self._ask("/faults", {"seed": seed, "rules": list(rules)})

    def _ask(self, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data=data), timeout=30) as response:
            return json.load(response)


@contextmanager
def running(script: str, *arguments: str) -> Iterator[RunningServer]:
    """The server `script` of this folder, on a free port unless the arguments name one; it ends with the context."""
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, f"{script} ended before it listened: status {process.wait()}"
        yield RunningServer(json.loads(line)["port"], process)
    finally:
        process.terminate()
        process.wait(timeout=30)
        process.stdout.close()
