"""Which loss may learn from which teacher, for every pair."""

from itertools import combinations

import pytest

from needle.errors import ConfigError
from needle.loss import ForwardKL, HardLabel
from needle.teacher.base import CAPABILITIES, TOKEN_CAPABILITIES, check_legal
from needle.teacher.checkpoint import CheckpointTeacher
from needle.teacher.recorded import RecordedTeacher

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


@pytest.mark.parametrize(
    ("loss", "teacher", "legal"),
    [
        (HardLabel, RecordedTeacher, True),
        (HardLabel, CheckpointTeacher, True),
        (ForwardKL, RecordedTeacher, False),
        (ForwardKL, CheckpointTeacher, True),
    ],
)
def test_the_pairs_of_this_repository(loss: type, teacher: type, legal: bool):
    assert loss.needs <= set(CAPABILITIES)
    assert teacher.capabilities <= set(CAPABILITIES)
    arguments = {
        "loss_name": "forward_kl",
        "needs": loss.needs,
        "teacher_name": "recorded",
        "capabilities": teacher.capabilities,
        "tokenizer": teacher.tokenizer,
    }
    if legal:
        check_legal(**arguments)
    else:
        with pytest.raises(ConfigError, match=r"needs top_k; teacher=recorded gives text: .*teacher=checkpoint"):
            check_legal(**arguments)
