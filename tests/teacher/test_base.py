"""Which loss may learn from which teacher, for every pair."""

from itertools import combinations
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from needle import config
from needle.errors import ConfigError
from needle.teacher.base import CAPABILITIES, check_legal
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
def test_of_what_is_said_over_other_tokens_only_stored_log_probabilities_serve(needs: frozenset[str]):
    """Those are aligned byte by byte; the rest is over whole vocabularies, or inside a network."""
    arguments = {"loss_name": "the_loss", "teacher_name": "the_teacher", "needs": needs, "capabilities": CAPABILITIES}
    if not needs & {"full_logits", "live", "features"}:
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
OWN_TOKENS = {"gemini", "openai_compatible", "transformers_local"}
# By what a loss needs: the teachers it may learn from.
LEGAL = {
    "text": TEACHERS.keys(),
    "samples": {"checkpoint", *OWN_TOKENS},
    "top_k": {"checkpoint", *OWN_TOKENS},
    "full_logits": {"checkpoint"},
}


def forms_of_losses() -> dict[str, frozenset[str]]:
    """Needs of every option of conf/loss, in both forms where it has two."""
    needs = {}
    for path in sorted((config.CONF / "loss").glob("*.yaml")):
        node = OmegaConf.load(path)
        forms = ("top_k", "full") if "distribution" in node else (None,)
        for form in forms:
            chosen = node if form is None else OmegaConf.merge(node, {"distribution": form})
            needs[path.stem if form is None else f"{path.stem}-{form}"] = config.build(chosen).needs
    return needs


LOSSES = forms_of_losses()


def test_the_matrix_has_every_teacher_that_can_be_configured(repository: Path):
    assert {path.stem for path in (repository / "conf/teacher").glob("*.yaml")} == TEACHERS.keys()


def test_losses_need_what_their_names_say():
    by_need = {need: {name for name, needs in LOSSES.items() if need in needs} for need in CAPABILITIES}
    assert {"hard_label", "label_smoothing"} <= by_need["text"]
    assert by_need["samples"] == {"expected_cross_entropy"}
    assert {"forward_kl-top_k", "taid-top_k"} <= by_need["top_k"]
    assert by_need["full_logits"] == {name for name in LOSSES if name.endswith("-full")}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_pairs_of_this_repository(loss: str, teacher: str):
    (need,), other = LOSSES[loss], TEACHERS[teacher]
    assert need in CAPABILITIES
    assert other.capabilities <= set(CAPABILITIES)
    gives = {"capabilities": other.capabilities, "tokenizer": other.tokenizer}
    if teacher in LEGAL[need]:
        check_legal(loss_name=loss, needs={need}, teacher_name=teacher, **gives)
    else:
        with pytest.raises(ConfigError, match=rf"loss={loss} needs {need}.*teacher={teacher} gives .*: use "):
            check_legal(loss_name=loss, needs={need}, teacher_name=teacher, **gives)
