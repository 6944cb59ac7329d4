"""pyproject.toml, requirements.lock, environment.yml, the installed packages and the imports say the same."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!]+)")
ACCELERATOR = re.compile(r"nvidia|cuda|triton|rocm")


def read_lock(text: str) -> dict[str, str]:
    """Name to version. ValueError for a line that is not a plain pin (build tag, URL, hash, option), or that names an
    accelerator's package."""
    versions: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        pin = PIN.fullmatch(line)
        if pin is None:
            raise ValueError(f"line {number}: {line!r} is not NAME==VERSION")
        name = canonicalize_name(pin["name"])
        if ACCELERATOR.match(name):
            raise ValueError(f"line {number}: {line!r} belongs to one kind of machine; torch brings its own")
        if name in versions:
            raise ValueError(f"line {number}: {name} is pinned twice")
        versions[name] = pin["version"]
    return versions


def unmet(requirements: Iterable[Requirement], versions: Mapping[str, str]) -> list[str]:
    """The requirements that `versions` (canonical name to version) leaves out or contradicts."""
    problems = []
    for requirement in requirements:
        version = versions.get(canonicalize_name(requirement.name))
        if version is None:
            problems.append(f"{requirement}: missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement}: {version}")
    return problems


def imported_modules(files: Iterable[Path]) -> dict[str, set[Path]]:
    """Top-level module to the files that import it, inside functions too; relative imports are left out."""
    found: dict[str, set[Path]] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in modules:
                found.setdefault(module.partition(".")[0], set()).add(file)
    return found


def undeclared(files: Iterable[Path], declared: Set[str], ours: Set[str]) -> dict[str, set[Path]]:
    """Imported modules that no declared distribution provides, and the files that import them."""
    providers = importlib.metadata.packages_distributions()
    return {
        module: where
        for module, where in imported_modules(files).items()
        if module not in sys.stdlib_module_names | ours
        and declared.isdisjoint(canonicalize_name(name) for name in providers.get(module, []))
    }


@pytest.fixture(scope="module")
def lock(repository: Path) -> dict[str, str]:
    return read_lock((repository / "requirements.lock").read_text())


@pytest.fixture(scope="module")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def runtime(project: dict) -> list[Requirement]:
    return [Requirement(line) for line in project["dependencies"]]


@pytest.fixture(scope="module")
def development(project: dict) -> list[Requirement]:
    return [Requirement(line) for line in project["optional-dependencies"]["dev"]]


def test_lock_meets_every_declared_dependency(lock, runtime, development):
    assert unmet([*runtime, *development], lock) == []


def test_lock_holds_what_its_packages_require_on_this_machine(lock):
    """Followed through the installed metadata, so that a package the lock forgets is found. torch is left out: what it
    requires differs between its builds."""
    required = []
    for name in lock.keys() - {"torch"}:
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                required.append(requirement)
    assert len(required) > len(lock)
    if sys.platform == "linux":
        assert unmet(required, lock) == []


def test_installed_versions_are_the_locks(lock):
    installed = {name: Version(importlib.metadata.version(name)).public for name in lock}
    assert installed == lock


def test_conda_environment_names_the_direct_dependencies_at_the_locks_versions(
    repository, lock, project, runtime, development
):
    environment = yaml.safe_load((repository / "environment.yml").read_text())
    python, pip, section = environment["dependencies"]
    constraint, *pins = section["pip"]
    assert pip == "pip"
    assert constraint == "--constraint requirements.lock"
    assert environment["name"] == project["name"]
    assert Version(python.removeprefix("python=")) in Requirement("python" + project["requires-python"]).specifier
    direct = {canonicalize_name(requirement.name) for requirement in [*runtime, *development]}
    assert read_lock("\n".join(pins)) == {name: lock[name] for name in direct}


def test_every_import_of_the_package_is_a_declared_dependency(repository, runtime):
    declared = {canonicalize_name(requirement.name) for requirement in runtime}
    assert undeclared((repository / "needle").rglob("*.py"), declared, {"needle"}) == {}


def test_every_import_of_the_tests_is_a_declared_dependency(repository, runtime, development):
    declared = {canonicalize_name(requirement.name) for requirement in [*runtime, *development]}
    own = {"needle", "tests", "conftest", *(path.stem for path in (repository / "tests" / "servers").glob("*.py"))}
    assert undeclared((repository / "tests").rglob("*.py"), declared, own) == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch==2.13.0+cpu",
        "torch>=2.13.0",
        "torch @ https://example.org/torch.whl",
        "--extra-index-url https://example.org/simple",
        "numpy==2.4.6 --hash=sha256:00",
        "nvidia-cudnn-cu13==9.20.0.48",
        "cuda-toolkit==13.0.3",
        "triton==3.7.1",
        "numpy==2.4.6\nNumPy==2.4.6",
    ],
)
def test_read_lock_refuses_what_ties_it_to_a_machine(line):
    with pytest.raises(ValueError, match="line"):
        read_lock(line)


def test_unmet_names_missing_and_contradicting_pins():
    requirements = [Requirement(line) for line in ("torch~=2.13.0", "numpy>=2", "rich>=15")]
    assert unmet(requirements, {"torch": "2.14.0", "rich": "15.0.0"}) == ["torch~=2.13.0: 2.14.0", "numpy>=2: missing"]


def test_undeclared_sees_an_import_inside_a_function(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import os\nfrom needle import schema\ndef f():\n    import yaml.nodes\n    from numpy import array\n"
    )
    assert undeclared([file], {"numpy"}, {"needle"}) == {"yaml": {file}}
