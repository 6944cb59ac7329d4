"""Decoding: batches, forced tokens and the grammar change how fast an answer comes, not which. Sampling draws from the
student's own distribution."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from needle.decode import Decoder, _Row, draw
from needle.schema import Tool, ToolCall, call_problems
from needle.student import SimpleAttentionNetwork, save
from needle.text.render import parse_calls
from needle.text.tokenizer import EOS, TextCodec, train_tokenizer

TOOLS = [
    Tool(
        "set_timer", "Start a timer.", {"type": "object", "properties": {"minutes": {"type": "integer", "maximum": 99}}}
    ),
    Tool("play.song", "Play music.", {"type": "object", "properties": {"mood": {"enum": ["calm", "loud"]}}}),
    Tool("stop", "Stop everything.", {"type": "object", "properties": {}}),
]
TEXT = {"type": "string"}
NOTE = Tool(
    "note",
    "Write a note.",
    {
        "type": "object",
        "properties": {"text": TEXT, "tags": {"type": "array", "items": TEXT}, "more": {"type": "object"}},
        "required": ["text"],
    },
)
NUMBER = {"type": "number"}
LOAN = Tool(
    "loan",
    "Work out a loan.",
    {
        "type": "object",
        "properties": {"amount": NUMBER, "years": {"type": "integer"}, "rate": NUMBER},
        "required": ["amount", "years", "rate"],
    },
)
REQUESTS = [
    (f"set a timer for {n} minutes{' and play something calm' * (n % 3)}", TOOLS[: 1 + n % 3]) for n in range(12)
]


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(train_tokenizer([query for query, _ in REQUESTS] * 3, vocab_size=400), "signature")


@pytest.fixture(scope="module")
def student(codec: TextCodec):
    torch.manual_seed(1)
    shape = {"width": 32, "heads": 2, "kv_heads": 1, "encoder_layers": 1, "decoder_layers": 1, "ffn_width": 0}
    switches = {"gated": True, "qk_norm": True, "sandwich_norm": False, "copy": True, "copy_width": 8}
    more = {"lexical_match": True, "selective_read": True, "rope_theta": 1e4, "dropout_frac": 0.1, "retrieval_width": 0}
    return SimpleAttentionNetwork(name="t", **shape, **switches, **more).build(codec)


def decoder(student, codec: TextCodec, **changes) -> Decoder:
    return Decoder(student, codec, **{"constrained": True, "max_new_tokens": 60, "max_calls": 3, **changes})


def test_batches_do_not_change_answers(student, codec: TextCodec):
    one = decoder(student, codec)
    alone = [one.decode([request])[0] for request in REQUESTS]
    together = one.decode(REQUESTS)
    assert [a.token_ids for a in alone] == [b.token_ids for b in together]
    for a, b in zip(alone, together, strict=True):
        assert a.confidence == pytest.approx(b.confidence, rel=1e-3, abs=1e-12)


def test_every_answer_fits_its_tools(student, codec: TextCodec):
    answers = decoder(student, codec, max_new_tokens=200).decode(REQUESTS)
    finished = [(a, tools) for a, (_, tools) in zip(answers, REQUESTS, strict=True) if a.calls is not None]
    assert finished
    for answer, tools in finished:
        for call in answer.calls or []:
            assert call_problems(call, {tool.name: tool for tool in tools}) == []


def test_confidence_is_the_students_probability_of_its_answer(student, codec: TextCodec):
    query, tools = REQUESTS[1]
    answer = decoder(student, codec, max_new_tokens=200).decode([(query, tools)])[0]
    source = torch.tensor([codec.encode_prompt(query, tools)])
    fed = torch.tensor([[1, *answer.token_ids[:-1]]])
    log_probs = student(input_ids=source, decoder_input_ids=fed).logits.log_softmax(-1)[0]
    expected = sum(float(log_probs[i, token]) for i, token in enumerate(answer.token_ids))
    if answer.token_ids[-1] == EOS:
        assert answer.confidence == pytest.approx(float(torch.tensor(expected).exp()), rel=1e-3, abs=1e-12)


def test_a_grammarless_greedy_answer_is_the_likeliest_token_each_step(student, codec: TextCodec):
    query, tools = REQUESTS[2]
    answer = decoder(student, codec, constrained=False, max_new_tokens=12).decode([(query, tools)])[0]
    source, ids = torch.tensor([codec.encode_prompt(query, tools)]), [1]
    for _ in range(12):
        ids.append(int(student(input_ids=source, decoder_input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    assert answer.token_ids == ids[1:]


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_that_does_not_end_by_itself_is_closed(codec: TextCodec, student, seed: int):
    restless = copy.deepcopy(student)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in restless.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    tools = [NOTE, LOAN]
    for answer in decoder(restless, codec, max_new_tokens=120).decode([(query, tools) for query, _ in REQUESTS]):
        assert answer.error is None
        assert not any(call_problems(call, {tool.name: tool for tool in tools}) for call in answer.calls)


def test_a_quote_inside_a_value_does_not_close_it(codec: TextCodec, student):
    ids = codec.encode_target([ToolCall("note", {"text": 'a "b', "tags": ["c"]})], [NOTE])[0][:-1]
    text = codec.decode(ids)
    cut = codec.tokenizer.encode(text[: text.index("b") + 1], add_special_tokens=False).ids
    one = decoder(student, codec)
    assert one._closers(_Row(0, None, answer=cut))[0] is one.closes_string_V
    assert one._closers(_Row(0, None, answer=ids))[0] is one.closes_structure_V


def test_limits_are_told(student, codec: TextCodec):
    long = decoder(student, codec, max_new_tokens=1).decode(REQUESTS[:1])[0]
    assert long.calls is None
    assert "max_new_tokens=1" in long.error
    wide = decoder(student, codec, max_source_tokens=5).decode(REQUESTS[:2])
    assert all("at most 5" in answer.error and answer.calls is None for answer in wide)


def test_no_tools_gives_no_call(student, codec: TextCodec):
    answer = decoder(student, codec).decode([("hello", ())])[0]
    assert answer.calls == []
    assert answer.text == "[]"


# Sampling.

PROBABILITIES = np.array([0.05, 0.4, 0.0, 0.1, 0.3, 0.15])


def frequencies(probabilities: np.ndarray, **settings) -> np.ndarray:
    """How often each token is drawn when `uniform` goes evenly from 0 to 1."""
    count = 2000
    with np.errstate(divide="ignore"):
        scores = np.log(probabilities)
    drawn = [draw(scores, **settings, uniform=(i + 0.5) / count) for i in range(count)]
    return np.bincount(drawn, minlength=len(probabilities)) / count


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, PROBABILITIES),
        (0.5, 1.0, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        (2.0, 1.0, PROBABILITIES**0.5 / (PROBABILITIES**0.5).sum()),
        (1.0, 0.6, np.array([0, 4, 0, 0, 3, 0]) / 7),  # 0.4 alone does not reach it
        (1.0, 0.75, np.array([0, 8, 0, 0, 6, 3]) / 17),
        (1.0, 1e-9, np.array([0, 1, 0, 0, 0, 0])),
        (0.5, 0.5, np.array([0, 1, 0, 0, 0, 0])),  # 0.16 of 0.285: the temperature comes first
    ],
)
def test_draws_are_as_frequent_as_probabilities_say(temperature: float, top_p: float, expected: np.ndarray):
    found = frequencies(PROBABILITIES, temperature=temperature, top_p=top_p)
    assert np.abs(found - expected).max() <= 1 / 2000 + 1e-12


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_line_draw_tokens_that_have_probability(uniform: float):
    scores = np.array([-np.inf, -3.0, -0.1, -np.inf], np.float32)
    assert draw(scores, temperature=0.7, top_p=1.0, uniform=uniform) in (1, 2)


def sampled(one: Decoder, requests, seed: int = 0, temperature: float = 1.0, top_p: float = 1.0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [one.codec.encode_prompt(query, tools) for query, tools in requests]
    settings = {"temperature": temperature, "top_p": top_p, "generator": generator}
    return one.sample(prompts, [tools for _, tools in requests], **settings)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.4, 1.0), (1.0, 0.5)])
def test_first_tokens_are_distributed_as_the_students_softmax(student, codec, temperature: float, top_p: float):
    """Pearson's chi-square, the tokens that are expected less than ten times taken together."""
    query, tools = "stop", TOOLS[2:]
    one, count = decoder(student, codec, constrained=False, max_new_tokens=1), 1500
    tokens = [ids[0] for ids in sampled(one, [(query, tools)] * count, temperature=temperature, top_p=top_p)]
    source = torch.tensor([codec.encode_prompt(query, tools)])
    with torch.no_grad():
        logits = student(input_ids=source, decoder_input_ids=torch.tensor([[1]])).logits[0, 0]
    ordered = (logits / temperature).softmax(-1).double().sort(descending=True)
    kept = ordered.values.cumsum(0) - ordered.values < top_p
    expected = ordered.values * kept / (ordered.values * kept).sum()
    found = torch.bincount(torch.tensor(tokens), minlength=len(logits))[ordered.indices].double()
    assert found[~kept].sum() == 0
    common = int((expected * count >= 10).sum())
    assert common > 3
    parts = (torch.cat([x[:common], x[common:].sum()[None]]) for x in (found, expected * count))
    observed, wanted = (x[: common + (float(expected[common:].sum()) > 0)] for x in parts)
    assert chisquare(observed, wanted).pvalue > 0.01


def test_samples_depend_on_the_generator_and_not_on_the_batch(student, codec: TextCodec):
    one = decoder(student, codec)
    before = torch.get_rng_state()
    whole = sampled(one, REQUESTS)
    assert sampled(one, REQUESTS) == whole
    assert sampled(one, REQUESTS, seed=1) != whole
    generator = torch.Generator().manual_seed(0)
    parts = []
    for start in range(0, len(REQUESTS), 5):
        chosen = REQUESTS[start : start + 5]
        prompts = [codec.encode_prompt(query, tools) for query, tools in chosen]
        shown = [tools for _, tools in chosen]
        parts += one.sample(prompts, shown, temperature=1.0, top_p=1.0, generator=generator)
    assert parts == whole
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("changes", [{"temperature": 1e-6}, {"top_p": 1e-9}])
@pytest.mark.parametrize("constrained", [True, False])
def test_the_coldest_sample_is_the_greedy_answer(student, codec: TextCodec, changes: dict, constrained: bool):
    one = decoder(student, codec, constrained=constrained, max_new_tokens=30)
    greedy = [answer.token_ids for answer in one.decode(REQUESTS[:4])]
    assert sampled(one, REQUESTS[:4], **changes) == greedy


def test_constrained_samples_always_fit_their_tools(student, codec: TextCodec):
    tools = [NOTE, *TOOLS]
    answers = sampled(decoder(student, codec, max_new_tokens=120), [(query, tools) for query, _ in REQUESTS * 2])
    assert len(set(map(tuple, answers))) > len(REQUESTS)
    for ids in answers:
        assert ids[-1] == EOS
        for call in parse_calls(codec.decode(ids)):
            assert call_problems(call, {tool.name: tool for tool in tools}) == []


def test_an_answer_without_tools_to_keep_to_is_free_beside_those_that_have_some(student, codec: TextCodec):
    one, free = decoder(student, codec), decoder(student, codec, constrained=False)
    prompts = [codec.encode_prompt(query, tools) for query, tools in REQUESTS[:2]]

    def sample(by: Decoder, tools) -> list[list[int]]:
        return by.sample(prompts, tools, temperature=1.0, top_p=1.0, generator=torch.Generator().manual_seed(4))

    mixed = sample(one, [None, REQUESTS[1][1]])
    assert mixed[0] == sample(free, [None, None])[0]
    assert mixed[1] == sample(one, [request[1] for request in REQUESTS[:2]])[1]


# The predict stage, as a process.


def predict(folder: Path, text: bytes | str, *overrides: str) -> tuple[subprocess.CompletedProcess, list[dict] | None]:
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    settings = [f"checkpoint={folder / 'student'}", f"input={source}", f"output={target}", "max_new_tokens=200"]
    command = [sys.executable, "-m", "needle.predict", *settings, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done, [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else None


@pytest.fixture(scope="module")
def folder(student, codec: TextCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    save(student, codec, folder / "student")
    return folder


def line(number: int, tools: list[dict], **more) -> str:
    return json.dumps({"id": f"r{number}", "query": f"set a timer for {number} minutes", "tools": tools, **more}) + "\n"


BARE = {"name": "set_timer", "description": "Start.", "parameters": TOOLS[0].parameters}
WRAPPED = {"type": "function", "function": {"name": "ns.stop-it", "parameters": {"type": "object", "properties": {}}}}


def test_predict_answers_in_order_and_reports_bad_lines(folder: Path):
    three_hundred = [{"name": f"tool{n}"} for n in range(300)]
    twice = [BARE, BARE]
    text = (
        line(1, [BARE, WRAPPED])
        + "not json\n"
        + line(2, [])
        + line(3, twice)
        + line(4, three_hundred)
        + '{"id": 5, "que'
    )
    done, records = predict(folder, text)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert [record["id"] for record in records] == ["r1", 2, "r2", "r3", "r4", 6]
    assert records[2]["calls"] == []
    assert "set_timer" in records[3]["error"]
    assert "cut off" in records[5]["error"]
    # A second time gives the same bytes.
    assert predict(folder, text)[1] == records


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (b"", [], ["empty"]),
        (line(1, [BARE]), ["checkpoint=/nowhere"], ["/nowhere", "model.safetensors"]),
        (line(1, [BARE]), ["input=/nowhere.jsonl"], ["/nowhere.jsonl"]),
        (line(1, [BARE]), ["max_calls=0"], ["max_calls=0"]),
    ],
    ids=["empty", "checkpoint", "input", "range"],
)
def test_predict_tells_mistakes(folder: Path, text, overrides: list[str], words: list[str]):
    done, _ = predict(folder, text, *overrides)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_bytes_that_are_no_text_cost_one_line_only(folder: Path):
    done, records = predict(
        folder, line(1, [BARE]).encode() + b'{"id": 2, "query": "caf\xe9", "tools": []}\n' + line(3, []).encode()
    )
    assert done.returncode == 1
    assert "0xe9" in records[1]["error"]
    assert records[2]["id"] == "r3"


def test_predict_starts_without_what_it_does_not_need():
    code = (
        "import needle.predict, sys; print([m for m in ('pytorch_lightning', 'wandb', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
