"""The other architectures: as large as they claim, the networks that transformers has, and served by the same code."""

# B batch, S source tokens, T target tokens, V vocabulary

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import needle.student
from needle import config
from needle.data.packing import IGNORE, collate, network_inputs
from needle.data.shards import About, Shard, ShardWriter
from needle.decode import Decoder
from needle.errors import ConfigError, DataError
from needle.loss import ForwardKL
from needle.optim import OptimSettings
from needle.rollouts import with_rows
from needle.schema import Tool, ToolCall
from needle.student.matrices import layer_matrices
from needle.student.quantisation import quantisable
from needle.student.segments import continued, positions_in_segment
from needle.teacher.checkpoint import CheckpointTeacher
from needle.text.render import render_query, render_tools
from needle.text.tokenizer import TextCodec, train_tokenizer
from needle.train import _initial_student, main

PIECES = 360
ROW = {"source_row_tokens": 300, "target_row_tokens": 100}
CASES = [
    ("start the timer for ten minutes", "start_timer", {"duration": "ten minutes"}),
    ("weather in Lisbon and the wind in Porto", "get_weather", {"city": "Lisbon", "wind": True}),
    ("remind me to call Chidi", "add_reminder", {"text": "call Chidi"}),
]
SIZES = {"width": 32, "heads": 4}
BARE = {"copy": False, "lexical_match": False, "selective_read": False}
SMALL: dict[str, dict[str, Any]] = {
    "t5_style_nano": {**SIZES, "encoder_layers": 2, "decoder_layers": 2, "ffn_width": 24},
    "llama_style_nano": {**SIZES, "kv_heads": 2, "layers": 2, "ffn_width": 24},
    "san_nano_decoder_only": {**SIZES, "kv_heads": 2, "layers": 3, "copy_width": 8},
}
VARIANTS = {
    **{name: (name, {}) for name in SMALL},
    "bare": ("san_nano_decoder_only", {**BARE, "ffn_width": 16, "gated": False}),
    "prefix": ("san_nano_decoder_only", {"bidirectional_source": True}),
}
# What each claims to be as large as, and the pieces of the tokenizer for which it does.
MATCHED = {
    "t5_style_nano": ("san_nano", 2048),
    "llama_style_nano": ("san_nano", 2048),
    "san_nano_decoder_only": ("san_nano", 2048),
    "san_nano_no_copy": ("san_nano", 2048),
    "san_nano_ffn": ("san_nano", 2048),
    "t5_style_base": ("san_base", 8192),
    "llama_style_base": ("san_base", 8192),
    "san_base_decoder_only": ("san_base", 8192),
    "san_base_no_copy": ("san_base", 8192),
    "san_base_ffn": ("san_base", 8192),
}


def node(name: str, **changes: Any) -> dict[str, Any]:
    """conf/student/NAME.yaml with its defaults, changed."""
    values = yaml.safe_load((config.CONF / "student" / f"{name}.yaml").read_text())
    for parent in values.pop("defaults", []):
        if parent != "_self_":
            values = {**node(parent), **values}
    return {**values, **changes}


@pytest.fixture(scope="module")
def tools() -> tuple[Tool, ...]:
    return tuple(
        Tool.from_dict(
            {"name": name, "description": query, "parameters": {"properties": {key: {} for key in arguments}}}
        )
        for query, name, arguments in CASES
    )


@pytest.fixture(scope="module")
def codec(tools: tuple[Tool, ...]) -> TextCodec:
    texts = [render_tools(tools, style="signature"), *(render_query(query) for query, _, _ in CASES)]
    return TextCodec(train_tokenizer(texts * 3, vocab_size=PIECES), "signature")


@pytest.fixture(scope="module")
def shard(codec: TextCodec, tools: tuple[Tool, ...], tmp_path_factory: pytest.TempPathFactory) -> Shard:
    writer = ShardWriter()
    for i, (query, name, arguments) in enumerate(CASES):
        shown = tools[: i + 1]
        target = codec.encode_target([ToolCall(name, arguments)], shown)
        writer.add(query, codec.encode_prompt(query, shown), *target, About(kind=0, gold_tools=1, tools=len(shown)))
    folder = tmp_path_factory.mktemp("shard") / "train"
    writer.save(folder)
    return Shard.open(folder)


@pytest.fixture(scope="module")
def build(codec: TextCodec):
    """Makes a small student of a variant, or of a file, with settings changed."""

    def make(name: str, *, moved: bool = True, **changes: Any) -> Any:
        name, variant = VARIANTS.get(name, (name, {}))
        torch.manual_seed(0)
        model = config.build(node(name, **{**SMALL.get(name, {}), **variant, **changes})).build(codec).eval()
        # Gates, norms and biases start where an error in them would not show.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * moved * torch.randn_like(parameter)
        return model

    return make


def alone(shard: Shard, index: int) -> dict[str, Tensor]:
    """An example without packing or padding."""
    lengths = (shard.source_lengths_N[index], shard.target_lengths_N[index])
    return collate(shard, [[index]], source_row_tokens=int(lengths[0]), target_row_tokens=int(lengths[1]))


def plain(shard: Shard, index: int) -> dict[str, Tensor]:
    batch = alone(shard, index)
    return {"input_ids": batch["source_ids_RS"], "decoder_input_ids": batch["decoder_ids_RT"]}


# ---- sizes


@pytest.mark.parametrize("name", MATCHED)
def test_a_matched_student_has_the_parameters_of_its_model(name: str):
    other, pieces = MATCHED[name]
    fake: Any = SimpleNamespace(vocab_size=pieces, separator_id=5, texts=lambda: ["a"] * pieces)

    def count(which: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in config.build(node(which)).build(fake).parameters())

    counted = count(name)
    assert abs(counted / count(other) - 1) < 0.02
    comment = " ".join((config.CONF / "student" / f"{name}.yaml").read_text().replace("\n#", "").split())
    assert f"{counted / 1e6:.1f}M parameters with {pieces:,} pieces" in comment


def test_every_architectures_files_are_matched_or_have_a_size_of_their_own():
    ladder = {"san_nano", "san_micro", "san_small", "san_base", "san_large"}
    assert {path.stem for path in (config.CONF / "student").glob("*.yaml")} == ladder | set(MATCHED)


@pytest.mark.parametrize("name", SMALL)
def test_every_setting_reaches_the_network(build, name: str):
    asked = config.build(node(name, **SMALL[name]))
    found = build(name).config
    assert {key: getattr(found, key) for key in vars(asked) if key != "name"} == {
        key: value for key, value in vars(asked).items() if key != "name"
    }


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("t5_style_nano", {"heads": 5}, "width=104 heads=5"),
        ("t5_style_nano", {"distance_max": 16}, "distance_max=16 distance_buckets=32"),
        ("llama_style_nano", {"kv_heads": 3}, "heads=4 kv_heads=3"),
        ("san_nano_decoder_only", {"width": 150}, "width=150 heads=4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_their_values(name: str, bad: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        config.build(node(name, **bad))


# ---- the networks are those of transformers, and the one sequence that they claim to read


def sequence(shard: Shard, index: int) -> tuple[Tensor, int]:
    """Source and target of an example in one row, and how long its source is."""
    ids = plain(shard, index)
    return torch.cat((ids["input_ids"], ids["decoder_input_ids"]), dim=1), ids["input_ids"].shape[1]


@torch.no_grad()
def test_the_llama_style_student_is_transformers_own_on_one_sequence(build, shard: Shard):
    model = build("llama_style_nano")
    own = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "model_type": "llama"})).eval()
    own.load_state_dict(model.state_dict())
    for index in range(len(shard)):
        ids, source = sequence(shard, index)
        assert torch.allclose(model(**plain(shard, index)).logits, own(input_ids=ids).logits[:, source:], atol=1e-4)


@torch.no_grad()
def test_the_t5_style_student_is_transformers_own(build, shard: Shard):
    model = build("t5_style_nano")
    own = T5ForConditionalGeneration(T5Config(**{**model.config.to_dict(), "model_type": "t5"})).eval()
    own.load_state_dict(model.state_dict())
    batch = alone(shard, 2)
    assert torch.allclose(model(**network_inputs(batch)).logits, own(**plain(shard, 2)).logits, atol=1e-4)


@torch.no_grad()
def test_the_decoder_only_student_reads_one_causal_sequence(build, shard: Shard):
    """Read as a source, the whole sequence gives the target's states."""
    model = build("bare")
    for index in range(len(shard)):
        ids, source = sequence(shard, index)
        states = model.read(ids).last_hidden_state[:, source:]
        logits = model(**plain(shard, index)).logits
        assert torch.allclose(logits, states @ model.embedding.weight.T, atol=1e-4)


@torch.no_grad()
def test_only_a_bidirectional_source_sees_what_is_behind(build, shard: Shard):
    ids = plain(shard, 2)["input_ids"]
    changed = torch.cat((ids[:, :-1], ids[:, -1:] + 1), dim=1)
    for whole in (False, True):
        model = build("bare", bidirectional_source=whole)
        first = [model.read(each).last_hidden_state[:, :-1] for each in (ids, changed)]
        assert torch.equal(*first) != whole


def test_positions_and_masks_of_a_continued_row_by_hand():
    source, target = torch.tensor([[1, 1, 1, 2, 2, 0]]), torch.tensor([[1, 1, 2, 0]])
    assert positions_in_segment(source).tolist() == [[0, 1, 2, 0, 1, 0]]
    mask, positions = continued(source, target, steps=4, past_tokens=0)
    assert positions[0, :3].tolist() == [3, 4, 2]
    assert mask[0, 0, :3].int().tolist() == [
        [1, 1, 1, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0, 1, 0],
    ]
    mask, positions = continued(torch.tensor([[1, 1, 0]]), None, steps=2, past_tokens=1)
    assert positions.tolist() == [[3, 4]]
    assert mask[0, 0].int().tolist() == [[1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 1]]


# ---- packed, cached, decoded


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_a_packed_example_gives_the_logits_it_gives_alone(build, shard: Shard, name: str):
    model, rows = build(name), [[2, 0, 1], [1, 1, 2]]
    packed = with_rows(collate(shard, rows, **ROW), 3)  # the last row is empty
    logits = model(**network_inputs(packed)).logits
    assert logits.shape == (3, ROW["target_row_tokens"], PIECES)
    assert logits.isfinite().all()
    for r, row in enumerate(rows):
        for segment, index in enumerate(row, 1):
            there = logits[r][packed["target_segments_RT"][r] == segment]
            for single in (network_inputs(alone(shard, index)), plain(shard, index)):
                assert torch.allclose(there, model(**single).logits[0], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_steps_with_a_cache_and_padding_equal_the_full_pass(build, shard: Shard, name: str):
    """Two prompts of different lengths; then the second alone, as when the first has ended."""
    model = build(name)
    examples = [plain(shard, index) for index in (0, 2)]
    sources = [example["input_ids"][0] for example in examples]
    source_BS = nn.utils.rnn.pad_sequence(sources, batch_first=True)
    mask_BS = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in sources], batch_first=True)
    target_BT = torch.stack([example["decoder_input_ids"][0, :9] for example in examples])
    encoded = model.get_encoder()(input_ids=source_BS, attention_mask=mask_BS)
    cache, steps = None, []
    for tokens in target_BT[:, :5].split([1, 3, 1], dim=1):
        given = {"encoder_outputs": encoded, "attention_mask": mask_BS, "past_key_values": cache}
        out = model(decoder_input_ids=tokens, **given, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    second = torch.tensor([1])
    cache.batch_select_indices(second)
    encoded = type(encoded)(**{key: value[second] for key, value in encoded.items()})
    given = {"encoder_outputs": encoded, "attention_mask": mask_BS[second], "past_key_values": cache}
    rest = model(decoder_input_ids=target_BT[second, 5:], **given, use_cache=True).logits
    for row, example in enumerate(examples):
        full = model(input_ids=example["input_ids"], decoder_input_ids=example["decoder_input_ids"][:, :9]).logits[0]
        assert torch.allclose(torch.cat(steps, dim=1)[row], full[:5], atol=1e-4)
        if row == 1:
            assert torch.allclose(rest[0], full[5:], atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_answers_keep_to_the_grammar_and_do_not_depend_on_the_batch(
    build, codec: TextCodec, tools: tuple[Tool, ...], name: str
):
    decoder = Decoder(build(name), codec, constrained=True, max_new_tokens=80, max_calls=2)
    requests = [(query, tools[: i + 1]) for i, (query, _, _) in enumerate(CASES)]
    together = decoder.decode(requests)
    assert [answer.token_ids for answer in together] == [decoder.decode([one])[0].token_ids for one in requests]
    for (_, shown), answer in zip(requests, together, strict=True):
        assert answer.calls is not None, answer.error
        assert {call.name for call in answer.calls} <= {tool.name for tool in shown}


# ---- learning


@pytest.fixture(scope="module")
def optim() -> OptimSettings:
    return config.build(yaml.safe_load((config.CONF / "optim" / "muon_adamw.yaml").read_text()))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_towards_a_teachers_distributions_lowers_the_loss(build, shard: Shard, optim: OptimSettings, name: str):
    """Every parameter has a part in it, and the distributions of a student of another architecture serve."""
    model, teacher = build(name, moved=False).train(), build("san_nano", width=16, heads=2, kv_heads=1)
    batch = collate(shard, [[0, 1], [2]], **ROW)
    with torch.no_grad():
        top = teacher(**network_inputs(batch)).logits.log_softmax(dim=-1).topk(8, dim=-1)
    signals = {**batch, "teacher_ids_RTK": top.indices, "teacher_log_probs_RTK": top.values}
    loss = config.build(yaml.safe_load((config.CONF / "loss" / "forward_kl.yaml").read_text()))
    assert isinstance(loss, ForwardKL)
    optimizer = optim.build(model)

    def nats() -> Tensor:
        kept = batch["labels_RT"] != IGNORE
        found = loss(student_logits_RTV=model(**network_inputs(batch)).logits, **signals)
        return found[kept].mean()

    before = nats()
    before.backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
    optimizer.step()
    assert nats() < before


@pytest.mark.parametrize("name", [*SMALL, "san_nano_ffn"])
def test_muon_gets_every_matrix_of_the_layers_head_by_head_and_nothing_else(build, optim: OptimSettings, name: str):
    model = build(name)
    groups = {id(p): group for group in optim.build(model).param_groups for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    embedding = model.get_input_embeddings().weight
    assert groups[id(embedding)]["lr"] == optim.embedding_lr
    assert quantisable(model, embedding=True).keys() - quantisable(model, embedding=False).keys() == {
        key for key, parameter in model.named_parameters() if parameter is embedding
    }
    linear = {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    heads = {key for key in linear if any(part in key for part in ("copy_head", "lexical", "selective", "lm_head"))}
    assert set(layer_matrices(model)) == linear - heads == quantisable(model, embedding=False).keys()
    for key, parameter in model.named_parameters():
        group = groups[id(parameter)]
        assert (group["kind"] == "muon") == (key in linear - heads), key
        if group["kind"] == "muon":
            # A head's part of a matrix is as wide as a head, whatever the matrix.
            width = parameter.shape[1] if group["by_column"] else parameter.shape[0]
            feed_forward = group["heads"] == 1
            assert feed_forward or width // group["heads"] == model.config.width // model.config.heads


# ---- on disk, as a teacher, as the start of another


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.mark.parametrize("name", SMALL)
def test_a_saved_student_is_the_same_student(build, codec: TextCodec, shard: Shard, folder: Path, name: str):
    model = build(name)
    needle.student.save(model, codec, folder)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        sizes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118
    assert sizes.count([PIECES, 32]) == 1  # the tied embedding, once
    loaded, _ = needle.student.load(folder)
    assert type(loaded) is type(model) is type(AutoModelForSeq2SeqLM.from_pretrained(folder))
    assert not loaded.training
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    inputs = plain(shard, 1)
    assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5)


def test_weights_of_another_size_are_refused(build, codec: TextCodec, folder: Path):
    needle.student.save(build("llama_style_nano"), codec, folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "intermediate_size": 48}))
    with pytest.raises(DataError, match=r"model\.safetensors does not fit config\.json"):
        needle.student.load(folder)


def test_a_baseline_teaches(build, codec: TextCodec, shard: Shard, folder: Path):
    model = build("t5_style_nano")
    needle.student.save(model, codec, folder)
    settings = OmegaConf.merge(
        OmegaConf.load(config.CONF / "teacher" / "checkpoint.yaml"), {"checkpoint": str(folder), "top_k": 3}
    )
    teacher = config.build(settings)
    assert isinstance(teacher, CheckpointTeacher)
    assert teacher.student_identity().startswith("needle_t5_style@")
    shape = {"rows_per_batch": 2, **ROW}
    ids_XK, _ = teacher.top_log_probs(teacher.network(), shard, **shape, progress=lambda *_: None)
    start, end = shard.target_offsets[1:3]
    assert ids_XK[start:end].tolist() == model(**plain(shard, 1)).logits[0].topk(3).indices.tolist()


def test_a_student_starts_from_one_of_its_own_kind(build, codec: TextCodec, folder: Path):
    model = build("t5_style_nano")
    needle.student.save(model, codec, folder)
    architectures = {name: config.build(node(name, **SMALL[name])) for name in SMALL}
    started, _ = _initial_student(folder, architectures["t5_style_nano"], folder)
    assert torch.equal(started.get_input_embeddings().weight, model.shared.weight)
    with pytest.raises(DataError, match="is a needle_t5_style student, student=llama_style_nano makes a needle_llama"):
        _initial_student(folder, architectures["llama_style_nano"], folder)
    wider = config.build(node("t5_style_nano", **{**SMALL["t5_style_nano"], "ffn_width": 48}))
    with pytest.raises(DataError, match=r"ffn_width=24, student\.ffn_width is 48"):
        _initial_student(folder, wider, folder)


# ---- what they cannot do is told before work starts


@pytest.mark.parametrize("student", SMALL)
@pytest.mark.parametrize("term", ["contrastive", "hidden_states", "attention_relations"])
def test_terms_that_read_an_encoder_decoders_inside_are_refused(student: str, term: str):
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("train", [f"student={student}", f"auxiliary=[{term}]", "teacher=checkpoint"])
    with pytest.raises(ConfigError, match=rf"student={student} has no .*auxiliary={term} needs .*student=san_nano"):
        config.build_settings(OmegaConf.to_container(cfg, resolve=True), main.stage_function)


def test_a_baseline_as_teacher_of_inner_layers_is_refused(build):
    term = config.build(OmegaConf.load(config.CONF / "auxiliary" / "hidden_states.yaml"))
    with pytest.raises(ConfigError, match=r"T5Style has no layers .*student=san_nano"):
        term.attach(student=build("san_nano", width=16, heads=2, kv_heads=1), teacher=build("t5_style_nano"))
