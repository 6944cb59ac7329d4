"""The losses and weightings of conf/, built once."""

from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from needle import config
from needle.loss.trials import Subject, forms


def _built(group: str) -> dict[str, Any]:
    names = sorted(path.stem for path in (config.CONF / group).glob("*.yaml"))
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return {name: config.build(compose("doctor", [f"{group}={name}"])[group]) for name in names}


@pytest.fixture(scope="session")
def losses() -> dict[str, Any]:
    """Every loss, by the name of its file."""
    return _built("loss")


@pytest.fixture(scope="session")
def weightings() -> dict[str, Any]:
    return _built("weighting")


@pytest.fixture(scope="session")
def subjects(losses: dict[str, Any], weightings: dict[str, Any]) -> list[Subject]:
    """Every loss in every form, under one weighting that is not even."""
    return [Subject(form, weightings["spans"]) for loss in losses.values() for form in forms(loss)]
