"""Every file under conf/ composes, resolves and binds, and every kind of mistake is told before work starts."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import Field

from needle import config
from needle.errors import ConfigError

PRIMARIES = sorted(path.stem for path in config.CONF.glob("*.yaml"))
OPTIONS = sorted(str(path.relative_to(config.CONF).with_suffix("")) for path in config.CONF.glob("*/*.yaml"))
# Groups that options of another group include; a stage never sees them alone.
NESTED = {"prices", "plan"}
# Words of loss names that a class name writes in capitals.
ACRONYMS = {"kd", "kl", "taid", "uld"}
ASKED_FOR = {
    "calibrate": ["checkpoint=a"],
    "predict": ["checkpoint=a", "input=b", "output=c"],
    "tune": ["study=s"],
    "teacher/openai_compatible": ["teacher.provider=p", "teacher.model=m", "teacher.base_url=null"],
}


def composed(primary: str, *overrides: str):
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return compose(primary, [*ASKED_FOR.get(primary, []), *overrides])


def stage_function(primary: str):
    return importlib.import_module(f"needle.{primary}").main.stage_function


def defaults_of(primary: str) -> set[str]:
    entries = OmegaConf.load(config.CONF / f"{primary}.yaml").defaults
    return {key for entry in entries if not isinstance(entry, str) for key in entry}


@pytest.mark.parametrize("primary", PRIMARIES)
def test_every_primary_file_binds_to_its_stage(primary: str):
    config.check(composed(primary), stage_function(primary))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_binds_in_every_stage_that_has_its_group(option: str):
    group, name = option.split("/")
    if group in NESTED:
        config.build(composed(option)[group])
        return
    users = [primary for primary in PRIMARIES if group in defaults_of(primary)]
    assert users, f"no primary file uses conf/{group}"
    for primary in users if group != "hydra" else ():
        cfg = composed(primary, f"{group}={name}", *ASKED_FOR.get(option, []))
        config.check(cfg, stage_function(primary))


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.split("/")[0] in ("loss", "student")])
def test_names_agree(option: str):
    group, name = option.split("/")
    node = OmegaConf.load(config.CONF / f"{option}.yaml")
    if group == "student":
        assert node.name == name
    else:
        words = (part.upper() if part in ACRONYMS else part.capitalize() for part in name.split("_"))
        assert node._target_.rsplit(".", 1)[1] == "".join(words)


@dataclass(frozen=True)
class Inner:
    size: Annotated[int, Field(ge=1)]
    names: tuple[str, ...]

    def __post_init__(self):
        if self.size == 13:
            raise ValueError("13 is unlucky; take 12")


def stage(cfg: dict, *, inner: Inner, rate: float, path: Path | None) -> None:
    """What the cases below are bound to."""


TARGET = f"{__name__}.Inner"
GOOD = {"inner": {"_target_": TARGET, "size": 2, "names": ["a"]}, "rate": 1, "path": "x"}


@pytest.fixture(autouse=True)
def own_targets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NEEDLE_TARGETS", __name__.split(".")[0])
    import sys

    monkeypatch.setitem(sys.modules, __name__.split(".")[0], sys.modules[__name__])
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


def changed(key: str, value) -> dict:
    cfg = OmegaConf.create(GOOD)
    OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def test_values_arrive_as_annotated():
    built = config.build_settings(GOOD, stage)
    assert built["inner"] == Inner(2, ("a",))
    assert built["rate"] == 1.0
    assert built["path"] == Path("x")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("inner.sise", 3, ["inner.sise", "did you mean size"]),
        ("inner.size", "3", ["inner.size", "integer"]),
        ("inner.size", True, ["inner.size", "integer"]),
        ("inner.size", 0, ["inner.size=0", "greater than or equal to 1"]),
        ("inner.names", [1], ["inner.names", "item 0"]),
        ("inner.size", "???", ["inner.size is not set"]),
        ("inner.size", "${nothing.here}", ["inner.size", "nothing"]),
        ("inner._target_", f"{__name__}.Iner", ["Iner", "did you mean Inner"]),
        ("inner._target_", "os.system", ["os.system", "NEEDLE_TARGETS"]),
        ("inner", None, ["inner=null", "_target_"]),
        ("rat", 1, ["rat=1", "did you mean rate"]),
    ],
)
def test_each_mistake_has_a_message_of_its_own(key: str, value, words: list[str]):
    with pytest.raises(ConfigError) as told:
        config.check(changed(key, value), stage)
    for word in words:
        assert word in str(told.value)


def test_all_mistakes_are_told_at_once():
    cfg = changed("inner.size", 0)
    cfg.rate = "fast"
    with pytest.raises(ConfigError) as told:
        config.check(cfg, stage)
    assert len(str(told.value).splitlines()) == 2


def test_a_targets_own_check_becomes_a_message():
    with pytest.raises(ConfigError, match="inner: 13 is unlucky; take 12"):
        config.build_settings(OmegaConf.to_container(changed("inner.size", 13)), stage)
