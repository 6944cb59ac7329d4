"""Which loss may learn from which teacher, for every pair."""

from itertools import combinations
from pathlib import Path

import pytest

from needle.errors import ConfigError
from needle.loss import ForwardKL, HardLabel
from needle.teacher.base import CAPABILITIES, TOKEN_CAPABILITIES, check_legal
from needle.teacher.checkpoint import CheckpointTeacher
from needle.teacher.gemini import GeminiTeacher
from needle.teacher.openai_compatible import OpenAICompatibleTeacher
from needle.teacher.recorded import RecordedTeacher
from needle.teacher.transformers_local import TransformersTeacher

SUBSETS = [frozenset(c) for n in range(len(CAPABILITIES) + 1) for c in combinations(CAPABILITIES, n)]


@pytest.mark.parametrize("needs", SUBSETS, ids=lambda s: "+".join(sorted(s)) or "nothing")
def test_a_pair_is_legal_where_the_teacher_gives_all_that_the_loss_needs(needs: frozenset[str]):
    for gives in SUBSETS:
        names = {"loss_name": "the_loss", "teacher_name": "the_teacher"}
        if needs <= gives:
            check_legal(**names, needs=needs, capabilities=gives, tokenizer="student")
            continue
        with pytest.raises(ConfigError) as caught:
            check_legal(**names, needs=needs, capabilities=gives, tokenizer="student")
        message = str(caught.value)
        assert "loss=the_loss" in message
        assert "teacher=the_teacher" in message
        assert all(lacking in message.split(";")[0] for lacking in needs - gives)
        assert "use " in message.split(";", 1)[1]


@pytest.mark.parametrize("needs", SUBSETS, ids=lambda s: "+".join(sorted(s)) or "nothing")
def test_distributions_over_other_tokens_do_not_serve_a_loss_over_the_students(needs: frozenset[str]):
    arguments = {"loss_name": "the_loss", "teacher_name": "the_teacher", "needs": needs, "capabilities": CAPABILITIES}
    if not needs & TOKEN_CAPABILITIES:
        check_legal(**arguments, tokenizer="own")
        return
    with pytest.raises(
        ConfigError, match=r"over the student's tokens; teacher=the_teacher gives them over its own: use"
    ):
        check_legal(**arguments, tokenizer="own")


TEACHERS = {
    "recorded": RecordedTeacher,
    "checkpoint": CheckpointTeacher,
    "gemini": GeminiTeacher,
    "openai_compatible": OpenAICompatibleTeacher,
    "transformers_local": TransformersTeacher,
}
LOSSES = {"hard_label": HardLabel, "forward_kl": ForwardKL}
LEGAL = {*(("hard_label", teacher) for teacher in TEACHERS), ("forward_kl", "checkpoint")}


def test_the_matrix_has_every_loss_and_teacher_that_can_be_configured(repository: Path):
    assert {path.stem for path in (repository / "conf/teacher").glob("*.yaml")} == TEACHERS.keys()
    assert {path.stem for path in (repository / "conf/loss").glob("*.yaml")} == LOSSES.keys()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_pairs_of_this_repository(loss: str, teacher: str):
    one, other = LOSSES[loss], TEACHERS[teacher]
    assert one.needs <= set(CAPABILITIES)
    assert other.capabilities <= set(CAPABILITIES)
    gives = {"capabilities": other.capabilities, "tokenizer": other.tokenizer}
    if (loss, teacher) in LEGAL:
        check_legal(loss_name=loss, needs=one.needs, teacher_name=teacher, **gives)
    else:
        with pytest.raises(
            ConfigError, match=rf"loss={loss} needs top_k.*teacher={teacher} gives .*teacher=checkpoint"
        ):
            check_legal(loss_name=loss, needs=one.needs, teacher_name=teacher, **gives)
