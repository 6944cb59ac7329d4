"""A small Hydra application whose runs end in every way that a run can end, for launchers to launch."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from needle import config

APPLICATION = """
import json, os, pathlib, signal, sys, time
import hydra

@hydra.main(version_base="1.3", config_path=None, config_name=None)
def main(cfg):
    folder = pathlib.Path(os.environ["ENDS"])
    (folder / f"{cfg.end}.started").write_text(json.dumps({"pid": os.getpid(), "cwd": os.getcwd()}))
    if cfg.end == "error":
        raise ValueError("seventeen")
    if cfg.end == "exit":
        sys.exit(2)
    if cfg.end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while cfg.end == "long":
            time.sleep(0.05)
    except KeyboardInterrupt:
        (folder / "long.stopped").touch()
        sys.exit(130)
    (folder / f"{cfg.end}.done").touch()
    return 17

if __name__ == "__main__":
    main()
"""


@dataclass(frozen=True)
class Application:
    folder: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    def command(self, launcher: str, ends: str, *overrides: str) -> list[str]:
        return [
            sys.executable,
            str(self.folder / "application.py"),
            "--multirun",
            f"hydra/launcher={launcher}",
            f"hydra.searchpath=[file://{config.CONF}]",
            f"hydra.sweep.dir={self.folder / 'sweep'}",
            f"+end={ends}",
            *overrides,
        ]

    def start(self, launcher: str, ends: str, *overrides: str) -> subprocess.Popen:
        process = subprocess.Popen(
            self.command(launcher, ends, *overrides),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def files(self) -> set[str]:
        return {path.name for path in self.folder.glob("*.*") if path.suffix in (".started", ".done", ".stopped")}

    def told(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())


@pytest.fixture
def application(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Application]:
    (tmp_path / "application.py").write_text(APPLICATION)
    monkeypatch.setenv("ENDS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(repository))
    application = Application(tmp_path)
    yield application
    for process in application.started:
        process.kill()
        process.communicate()
