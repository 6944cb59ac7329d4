"""Matching a teacher's layers: the values, what they must not depend on, and that they can be learnt from."""

# R rows, T tokens, C vector width

import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from needle import config
from needle.data.packing import collate
from needle.data.shards import About, Shard, ShardWriter
from needle.errors import ConfigError
from needle.loss import AttentionRelations, Fixed, HardLabel, HiddenStates, Mixing, Schedule, Weighting
from needle.loss.attention_relations import pieces, relation_kl
from needle.loss.features import resolve
from needle.loss.hidden_states import state_distance
from needle.loss.objective import Objective
from needle.student import SANConfig, SANForConditionalGeneration
from needle.student.taps import Point
from needle.train import main as train

CONSTANT = {"shape": "constant", "begin_frac": 0.0, "end_frac": 1.0}
ONE = Schedule(start=1.0, end=1.0, **CONSTANT)
STATES = {
    "weight": ONE,
    "encoder": "even",
    "decoder": "even",
    "distance": "cosine",
    "projection": "learned",
    "layer_norm": "none",
}
RELATIONS = {
    "weight": ONE,
    "encoder": "last",
    "decoder": "last",
    "relations": ("queries", "keys", "values"),
    "relation_heads": 4,
}
TERMS = {
    "cosine": HiddenStates(**STATES),
    "mse": HiddenStates(**{**STATES, "distance": "mse", "layer_norm": "teacher"}),
    "relations": AttentionRelations(**RELATIONS),
}
SMALL = {"width": 16, "heads": 2, "kv_heads": 1, "encoder_layers": 2, "decoder_layers": 2}
LARGE = {"width": 24, "heads": 3, "kv_heads": 3, "encoder_layers": 3, "decoder_layers": 1}
LENGTHS = ((9, 5), (4, 3), (7, 6), (11, 4))  # of an example's source and target


def network(seed: int, **sizes: int) -> SANForConditionalGeneration:
    torch.manual_seed(seed)
    return SANForConditionalGeneration(SANConfig(vocab_size=64, copy_width=8, **sizes))


@pytest.fixture(scope="module")
def teacher() -> SANForConditionalGeneration:
    return network(1, **LARGE).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    writer, generator = ShardWriter(), torch.Generator().manual_seed(2)
    for i, (source, target) in enumerate(LENGTHS):
        tokens = [torch.randint(8, 64, (length,), generator=generator).tolist() for length in (source, target)]
        writer.add(f"{i}", *tokens, [0] * target, About(kind=0, gold_tools=1, tools=1))
    folder: Path = tmp_path_factory.mktemp("shards") / "train"
    writer.save(folder)
    return Shard.open(folder)


def rows(shard: Shard, *examples: list[int], source: int = 20, target: int = 12) -> dict[str, Tensor]:
    return collate(shard, examples, source_row_tokens=source, target_row_tokens=target)


@pytest.fixture(scope="module")
def packed(shard: Shard) -> dict[str, Tensor]:
    return rows(shard, [0, 1], [2], [3])


def objective(term, student: nn.Module, teacher: nn.Module) -> Objective:
    return Objective(
        loss=HardLabel(),
        mixing=Mixing(start=1.0, end=1.0, **CONSTANT),
        weighting=Weighting(
            **dict.fromkeys(("structure", "name", "key", "value", "stop"), 1.0),
            kinds={},
            confidence_power=0.0,
            focal_gamma=0.0,
        ),
        balance=Fixed(),
        auxiliaries={"term": term},
        student=student,
        teacher=teacher,
    )


def term_sum(goal: Objective, student: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return goal.measure(batch, student=student, progress=torch.tensor(0.5), share=1.0).sums["term"]


def distance(student, teacher, **how) -> Tensor:
    made = [torch.tensor([[values]], dtype=torch.float64) for values in (student, teacher)]
    return state_distance(student_states_RTL=made[0], teacher_states_RTL=made[1], **how).squeeze()


def test_distances_of_a_hand_case():
    assert distance([3.0, 4.0], [4.0, 3.0], distance="cosine", layer_norm="none") == pytest.approx(1 - 24 / 25)
    assert distance([1.0, 2.0], [3.0, 2.0], distance="mse", layer_norm="none") == pytest.approx(2.0)
    # 1, 5 becomes -1, 1; the student's 0, 2 stays or becomes the same.
    assert distance([0.0, 2.0], [1.0, 5.0], distance="mse", layer_norm="teacher") == pytest.approx(1.0, abs=1e-4)
    assert distance([0.0, 2.0], [1.0, 5.0], distance="mse", layer_norm="both") == pytest.approx(0.0, abs=1e-4)
    assert distance([0.0, 0.0], [1.0, 5.0], distance="mse", layer_norm="teacher") == pytest.approx(1.0, abs=1e-4)


def relations(student_RTC: Tensor, teacher_RTC: Tensor, segments: list[list[int]], *, heads=1, causal=False) -> Tensor:
    return relation_kl(
        student_vectors_RTC=student_RTC,
        teacher_vectors_RTC=teacher_RTC,
        segments_RT=torch.tensor(segments),
        relation_heads=heads,
        causal=causal,
    )


def kl(teacher: list[float], student: list[float]) -> float:
    """From logits, in plain arithmetic."""
    p, q = ([math.exp(x) / sum(map(math.exp, logits)) for x in logits] for logits in (teacher, student))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_relations_of_a_hand_case():
    student, teacher = (torch.tensor([[[a], [b], [9.0]]], dtype=torch.float64) for a, b in ((1.0, 2.0), (0.5, -1.0)))
    nats = relations(student, teacher, [[1, 1, 0]])
    expected = [kl([0.25, -0.5], [1.0, 2.0]), kl([-0.5, 1.0], [2.0, 4.0]), 0.0]
    assert nats.squeeze().tolist() == pytest.approx(expected)
    causal = relations(student, teacher, [[1, 1, 0]], causal=True)
    assert causal.squeeze().tolist() == pytest.approx([0.0, expected[1], 0.0])
    # Heads are averaged, and products scaled by the root of a relation head's width.
    twice = relations(student.repeat(1, 1, 2), torch.cat((teacher, student), dim=-1), [[1, 1, 0]], heads=2)
    assert twice.squeeze().tolist() == pytest.approx([value / 2 for value in expected])
    wide = relations(student.repeat(1, 1, 2) * 2**-0.25, teacher.repeat(1, 1, 2) * 2**-0.25, [[1, 1, 0]])
    assert wide.squeeze().tolist() == pytest.approx(expected)


def vectors(width: int, seed: int, tokens: int = 6) -> Tensor:
    return torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SEGMENTS = [[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]]


@pytest.mark.parametrize("causal", [False, True])
def test_relations_do_not_see_how_a_head_lies_nor_who_is_wider(causal: bool):
    student, teacher = vectors(8, 0), vectors(12, 1)
    nats = relations(student, teacher, SEGMENTS, heads=2, causal=causal)
    rotation = torch.linalg.qr(vectors(6, 2)[0]).Q
    turned = (teacher.unflatten(-1, (2, 6)) @ rotation).flatten(2)
    assert torch.allclose(relations(student, turned, SEGMENTS, heads=2, causal=causal), nats)
    padded = torch.nn.functional.pad(teacher.unflatten(-1, (2, 6)), (0, 18)).flatten(2) * 4**0.25
    assert torch.allclose(relations(student, padded, SEGMENTS, heads=2, causal=causal), nats)
    assert (nats[0, :5] >= 0).all()
    assert nats.sum() > 0.1
    assert torch.equal(relations(teacher, teacher, SEGMENTS, heads=2, causal=causal), torch.zeros(2, 6).double())


def test_a_token_relates_to_its_own_example_and_in_a_decoder_to_what_came_before():
    """The other tokens' vectors get no gradient."""
    student, teacher = vectors(8, 0).requires_grad_(), vectors(12, 1)
    for causal, seen in ((False, [0, 1, 2]), (True, [0, 1])):
        nats = relations(student, teacher, SEGMENTS, heads=2, causal=causal)
        (gradient,) = torch.autograd.grad(nats[0, 1], student)
        assert gradient[0].abs().sum(dim=-1).nonzero().flatten().tolist() == seen
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_examples_alone_give_what_their_rows_give(causal: bool):
    """What a CPU and a GPU do."""
    segments = torch.tensor(SEGMENTS)
    student, teacher = vectors(8, 0), vectors(12, 1)
    whole = relations(student, teacher, SEGMENTS, heads=2, causal=causal)
    cuts = pieces(segments)
    assert [(row.start, place.start, place.stop) for row, place in cuts] == [(0, 0, 3), (0, 3, 5), (1, 0, 1), (1, 1, 6)]
    for cut in cuts:
        alone = relations(student[cut], teacher[cut], segments[cut].tolist(), heads=2, causal=causal)
        assert torch.allclose(alone, whole[cut])


def test_gradients_agree_with_finite_differences():
    student, teacher = vectors(4, 3).requires_grad_(), vectors(4, 4)
    for how in (
        {"distance": "cosine", "layer_norm": "none"},
        {"distance": "cosine", "layer_norm": "both"},
        {"distance": "mse", "layer_norm": "none"},
        {"distance": "mse", "layer_norm": "teacher"},
    ):
        assert torch.autograd.gradcheck(
            lambda x, how=how: state_distance(student_states_RTL=x, teacher_states_RTL=teacher, **how),
            student,
            atol=1e-5,
            rtol=1e-5,
        )
    for causal in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, causal=causal: relations(x, teacher, SEGMENTS, heads=2, causal=causal),
            student,
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize(
    "term",
    [
        HiddenStates(**{**STATES, "projection": "none"}),
        HiddenStates(**{**STATES, "projection": "none", "distance": "mse", "layer_norm": "both"}),
        AttentionRelations(**{**RELATIONS, "encoder": "even", "decoder": "even"}),
    ],
)
def test_a_student_that_is_its_teacher_is_nothing_away(term, packed):
    student = network(1, **LARGE).eval()
    goal = objective(term, student, network(1, **LARGE).eval())
    assert float(term_sum(goal, student, packed).detach()) == pytest.approx(0.0, abs=1e-4)
    other = network(3, **LARGE).eval()
    goal = objective(term, other, student)
    assert term_sum(goal, other, packed) / goal.counts(packed)["term"] > 0.01


@pytest.mark.parametrize("name", TERMS)
def test_padding_packing_and_order_of_rows_make_no_difference(name: str, shard, teacher):
    student = network(0, **SMALL).eval()
    goal = objective(TERMS[name], student, teacher)
    batches = [
        rows(shard, [0, 1, 2, 3], source=31, target=18),
        rows(shard, [3], [2], [1], [0], source=11, target=6),
        rows(shard, [1, 0], [2, 3], source=40, target=30),
    ]
    sums = [term_sum(goal, student, batch) for batch in batches]
    pairs = [len(goal.auxiliaries["term"].layers.pairs), sum(source for source, _ in LENGTHS)]
    assert pairs[1] == 31
    assert len({int(goal.counts(batch)["term"]) for batch in batches}) == 1
    gradients = [torch.autograd.grad(value, student.embedding.weight)[0] for value in sums]
    for value, gradient in zip(sums[1:], gradients[1:], strict=True):
        assert torch.allclose(value, sums[0], rtol=1e-4)
        assert torch.allclose(gradient, gradients[0], rtol=1e-3, atol=1e-5)


def test_tokens_count_once_a_pair_of_layers(packed, teacher):
    goal = objective(HiddenStates(**{**STATES, "decoder": "last"}), network(0, **SMALL), teacher)
    assert goal.counts(packed)["term"] == 2 * 31 + 1 * 18


@pytest.mark.parametrize("name", TERMS)
def test_micro_batches_add_up_and_only_the_student_and_the_maps_learn(name: str, packed, teacher):
    student = network(0, **SMALL)
    watched = network(1, **LARGE).eval()  # not frozen: it must get nothing even so
    goal = objective(TERMS[name], student, watched)
    counts, gradients = goal.counts(packed), []
    for cuts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)], [slice(i, i + 1) for i in range(3)]):
        student.zero_grad()
        goal.zero_grad()
        for cut in cuts:
            part = {key: tensor[cut] for key, tensor in packed.items()}
            measured = goal.measure(part, student=student, progress=torch.tensor(0.5), share=1.0)
            goal.total(measured.sums, counts, progress=0.5, part_frac=len(part["labels_RT"]) / 3).backward()
        learnt = {**dict(student.named_parameters()), **dict(goal.named_parameters())}
        gradients.append({key: value.grad for key, value in learnt.items() if value.grad is not None})
    for other in gradients[1:]:
        for key, gradient in gradients[0].items():
            assert torch.allclose(other[key], gradient, rtol=1e-3, atol=1e-6), key
    maps = [key for key in gradients[0] if "projections" in key]
    # Both encoder layers, and the decoder's last to the teacher's only one.
    assert len(maps) == (0 if name == "relations" else 3)
    assert all(gradients[0][key].abs().sum() > 0 for key in maps)
    assert all(parameter.grad is None for parameter in watched.parameters())
    assert not any("teacher" in key or "embedding" in key for key in goal.state_dict())


@pytest.mark.parametrize("name", TERMS)
def test_a_weight_of_zero_gives_no_gradient(name: str, packed, teacher):
    rising = Schedule(shape="linear", start=0.0, end=1.0, begin_frac=0.0, end_frac=1.0)
    settings = type(TERMS[name])(**{**vars(TERMS[name]), "weight": rising})
    student = network(0, **SMALL)
    goal = objective(settings, student, teacher)
    query = student.encoder.layers[-1].attention.query.weight
    for progress, moves in ((0.0, False), (0.5, True)):
        measured = goal.measure(packed, student=student, progress=torch.tensor(progress), share=1.0)
        sums = {**measured.sums, "tokens": 0 * measured.sums["tokens"]}
        total = goal.total(sums, goal.counts(packed), progress=progress, part_frac=1.0)
        (gradient,) = torch.autograd.grad(total, query)
        assert bool(gradient.abs().sum() > 0) is moves


@pytest.mark.parametrize("name", ["cosine", "relations"])
def test_a_student_of_another_shape_learns_from_the_term_alone(name: str, packed, teacher):
    student = network(0, **SMALL)
    goal = objective(TERMS[name], student, teacher)
    optimizer = torch.optim.AdamW([*student.parameters(), *goal.parameters()], lr=0.01)
    means = []
    for _ in range(60):
        mean = term_sum(goal, student, packed) / goal.counts(packed)["term"]
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
        means.append(float(mean.detach()))
    assert means[-1] < 0.5 * means[0]


def test_layers_are_spread_evenly_and_end_together():
    def even(student: int, teacher: int) -> list[tuple[int, int]]:
        found = resolve("even", part="encoder", student_layers=student, teacher_layers=teacher)
        return [(pair.student, pair.teacher) for pair in found]

    assert even(4, 7) == [(1, 2), (2, 4), (3, 5), (4, 7)]
    assert even(7, 4) == [(2, 1), (4, 2), (5, 3), (7, 4)]
    assert even(3, 3) == [(1, 1), (2, 2), (3, 3)]
    assert even(5, 1) == [(5, 1)]
    for student in range(1, 15):
        for other in range(1, 15):
            mine, theirs = zip(*even(student, other), strict=True)
            assert mine[-1] == student
            assert theirs[-1] == other
            assert len(set(mine)) == len(set(theirs)) == min(student, other)
            assert min(mine + theirs) >= 1


def test_named_layers_are_the_ones_compared(packed, teacher):
    student = network(0, **SMALL).eval()
    named = {"student": [2, 1], "teacher": [1, 3]}
    settings = {**STATES, "encoder": named, "decoder": None, "distance": "mse", "projection": "learned"}
    goal = objective(HiddenStates(**settings), student, teacher)
    value = term_sum(goal, student, packed)
    term = goal.auxiliaries["term"]
    inputs = {"input_ids": packed["source_ids_RS"], "source_segments_BS": packed["source_segments_RS"]}
    inputs |= {
        "decoder_input_ids": packed["decoder_ids_RT"],
        "target_segments_BT": packed["target_segments_RT"],
    }
    mine, theirs = term.layers.student_taps.of(student(**inputs)), term.layers.teacher_taps.of(teacher(**inputs))
    expected = torch.zeros(())
    for one, other in zip(named["student"], named["teacher"], strict=True):
        mapped = mine[Point("encoder", one, "states")] @ term.projections[f"encoder_{one}_{other}"].weight.T
        squares = (mapped - theirs[Point("encoder", other, "states")]).square().mean(dim=-1)
        expected = expected + squares[packed["source_segments_RS"] > 0].sum()
    assert torch.allclose(value, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"encoder": {"student": [3], "teacher": [3]}}, ["encoder.student=[3]", "2 layers", "teacher's 3"]),
        ({"encoder": {"student": [2], "teacher": [4]}}, ["encoder.teacher=[4]", "2 layers", "teacher's 3"]),
        ({"projection": "none"}, ["16 wide", "24", "projection=learned"]),
    ],
)
def test_what_the_networks_do_not_have_is_refused(settings, words, teacher):
    with pytest.raises(ConfigError) as told:
        HiddenStates(**{**STATES, **settings}).attach(student=network(0, **SMALL), teacher=teacher)
    assert all(word in str(told.value) for word in words)


def test_relation_heads_must_divide_and_a_teacher_must_be_there(teacher):
    student = network(0, **SMALL)
    with pytest.raises(ConfigError, match="relation_heads=3: the student's queries are 16 wide"):
        AttentionRelations(**{**RELATIONS, "relation_heads": 3}).attach(student=student, teacher=teacher)
    with pytest.raises(ConfigError, match="relation_heads=16: the student's keys are 8 wide"):
        AttentionRelations(**{**RELATIONS, "relation_heads": 16, "relations": ("keys",)}).attach(
            student=student, teacher=teacher
        )
    with pytest.raises(ConfigError, match="teacher=checkpoint"):
        AttentionRelations(**RELATIONS).attach(student=student, teacher=None)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (HiddenStates, {**STATES, "encoder": None, "decoder": None}, "nothing would be compared"),
        (HiddenStates, {**STATES, "projection": "none", "layer_norm": "teacher"}, "layer_norm=both"),
        (HiddenStates, {**STATES, "encoder": {"student": [1], "teacher": [1, 2]}}, "1 student layers and 2 teacher"),
        (AttentionRelations, {**RELATIONS, "relations": ("keys", "keys")}, "once"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        kind(**settings)


def bound(cfg) -> dict:
    """As a stage does it: checked, then built."""
    config.check(cfg, train.stage_function)
    return config.build(cfg)


def composed(*overrides: str):
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return compose("train", list(overrides))


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], []),
        (["auxiliary=[]"], []),
        (["auxiliary=hidden_states"], ["hidden_states"]),
        (["auxiliary=[attention_relations,hidden_states]"], ["attention_relations", "hidden_states"]),
    ],
)
def test_terms_are_chosen_as_a_list_that_the_run_records(overrides, names):
    cfg = composed(*overrides, "student=san_nano")
    config.check(cfg, train.stage_function)
    assert list(cfg.auxiliaries) == names
    assert config.listed_choices(cfg) == {"auxiliary": f"[{','.join(names)}]"}
    assert [type(term).__name__ for term in config.build(cfg.auxiliaries).values()] == [
        "".join(map(str.capitalize, name.split("_"))) for name in names
    ]


def test_an_experiment_chooses_terms(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "features.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /auxiliary: [hidden_states, attention_relations]\n"
        "auxiliaries:\n  hidden_states:\n    encoder: {student: [1, 2], teacher: [2, 3]}\n"
    )
    cfg = composed(
        "experiment=features", f"hydra.searchpath=[{tmp_path}]", "auxiliaries.attention_relations.decoder=null"
    )
    config.check(cfg, train.stage_function)
    built = config.build(cfg.auxiliaries)
    assert built["hidden_states"].encoder == {"student": [1, 2], "teacher": [2, 3]}
    assert built["attention_relations"].decoder is None


@pytest.mark.parametrize(
    "layers", ["first", "{student: [1]}", "{student: [0], teacher: [1]}", "{student: [1], teacher: [x]}"]
)
def test_a_map_that_is_none_is_told_before_work_starts(layers: str):
    cfg = composed("auxiliary=[hidden_states]", f"auxiliaries.hidden_states.encoder={layers}")
    with pytest.raises(ConfigError, match=r"auxiliaries\.hidden_states(\.|: )encoder"):
        bound(cfg)


def test_the_words_that_choose_again_hold_lists_and_are_quoted():
    cfg = {
        "_choices_": {"auxiliary": "[hidden_states,z_loss]", "data": "demo"},
        "_overrides_": ["auxiliary=[hidden_states,z_loss]", "auxiliaries.z_loss.weight.start=2", "data.a=1", "seed=3"],
    }
    assert config.as_overrides(cfg, "data", "auxiliary") == (
        "data=demo 'auxiliary=[hidden_states,z_loss]' auxiliaries.z_loss.weight.start=2 data.a=1"
    )
