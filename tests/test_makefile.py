"""The Makefile: its help, the order of its stages, and a setup that finishes what an interrupted one began.

The installers are stand-ins that record how they were called: what is tested is make's decisions, in a second.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
    "-c "*) exit "${PYTHON_IS_OLD:-0}" ;;
    *"-m venv"*)
        rm -rf .venv
        mkdir -p .venv/bin
        cp "$0" .venv/bin/python
        cp "$0" .venv/bin/uv ;;
    *requirements.lock*) exit "${INSTALL_STATUS:-0}" ;;
esac
"""


class Setup:
    """A folder with the repository's Makefile and stand-ins for the interpreter and the installer."""

    def __init__(self, repository: Path, folder: Path):
        self.folder = folder
        self.calls_file = folder / "calls"
        for name in ("Makefile", "requirements.lock", "pyproject.toml"):
            shutil.copy(repository / name, folder)
        self.python = folder / "stand-in-python"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)

    def make(self, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        """The finished process and the calls it made, without probes of the interpreter."""
        self.calls_file.write_text("")
        done = subprocess.run(
            ["make", *arguments, f"PYTHON={self.python}"],
            cwd=self.folder,
            env=clean_environment() | {"CALLS": str(self.calls_file)} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = self.calls_file.read_text().splitlines()
        return done, [call for call in calls if " -c " not in call and "--version" not in call]


def clean_environment() -> dict[str, str]:
    """Without the flags that an outer `make test` passes down."""
    return {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}


@pytest.fixture
def setup(repository: Path, tmp_path: Path) -> Setup:
    return Setup(repository, tmp_path)


def test_setup_installs_once(setup):
    done, calls = setup.make("setup")
    assert done.returncode == 0, done.stderr
    assert [call.split()[:3] for call in calls] == [
        ["stand-in-python", "-m", "venv"],
        ["python", "-m", "pip"],
        ["uv", "pip", "install"],
        ["uv", "pip", "install"],
    ]
    assert "--requirement requirements.lock" in calls[2]
    assert "--editable ." in calls[3]
    assert setup.make("setup")[1] == []


def test_setup_installs_the_locks_uv(setup):
    version = re.search(r"^uv==(.+)$", (setup.folder / "requirements.lock").read_text(), re.MULTILINE)
    assert version is not None
    assert setup.make("setup")[1][1].endswith(f" uv=={version[1]}")


def test_setup_that_was_cut_short_starts_afresh(setup):
    failed, _ = setup.make("setup", INSTALL_STATUS="130")
    assert failed.returncode != 0
    _, calls = setup.make("setup")
    assert "-m venv" in calls[0]
    assert setup.make("setup")[1] == []


def test_changed_lock_is_installed_into_the_same_environment(setup):
    setup.make("setup")
    later = (setup.folder / ".venv/.setup-done").stat().st_mtime + 10
    os.utime(setup.folder / "requirements.lock", (later, later))
    _, calls = setup.make("setup")
    assert any("--requirement requirements.lock" in call for call in calls)
    assert not any("-m venv" in call for call in calls)


def test_old_python_is_refused_with_a_way_out(setup):
    done, calls = setup.make("setup", PYTHON_IS_OLD="1")
    assert done.returncode != 0
    assert "is not Python 3.11 or newer; name one: make setup PYTHON=python3.11" in done.stderr
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["WHEELS=", "TORCH_INDEX="], []),
        (["WHEELS=wheels"], ["--find-links wheels"]),
        (
            ["TORCH_INDEX=https://torch.test"],
            ["--index https://torch.test", "--index-strategy unsafe-best-match"],
        ),
    ],
)
def test_where_torch_comes_from(setup, arguments, expected):
    install = setup.make("setup", *arguments)[1][2]
    assert all(option in install for option in expected)
    if not expected:
        assert "--find-links" not in install
        assert "--index" not in install


def test_help_is_the_default_and_lists_every_target_in_pipeline_order(repository):
    listed = subprocess.run(
        ["make"], cwd=repository, env=clean_environment(), capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    names = [line.split()[1] for line in listed]
    assert all(len(line.split(maxsplit=2)) == 3 and len(line) <= 100 for line in listed)
    phony = re.search(r"^\.PHONY: (.+)$", (repository / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert names == phony[1].split()
    stages = ["setup", "generate", "prepare", "signals", "train", "score", "report", "demo", "test"]
    assert [name for name in names if name in stages] == stages


def test_every_stage_a_recipe_runs_exists(repository):
    modules = set(re.findall(r"-m (needle\.\w+)", (repository / "Makefile").read_text()))
    assert modules
    missing = {module for module in modules if not (repository / module.replace(".", "/")).with_suffix(".py").is_file()}
    assert missing == set()


def test_continuous_integration_runs_make_test(repository):
    script = repository / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "exec make test"
