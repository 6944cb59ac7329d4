"""How likely it is that a student's answer is right: a small head, fitted after training on the student's own answers.

A student's probability of its answer is a product over tokens. It falls with every token of a long answer, counts a
choice between two spellings like a choice between two tools, and says nothing of what the decoder never doubted. The
head reads that probability beside the least likely token, the length, the number of calls and of tools, and (in its
largest form) the mean encoder state of the prompt through one ReLU layer of a quarter of its width. Its logit is
calibrated by a slope and an intercept (Platt 1999). `python -m needle.calibrate` fits it; it lies beside the weights as
confidence.safetensors and confidence.json, which names the student that it belongs to.

Cost: some thousand multiplications an answer, in float64 on the CPU, wherever the student runs.
"""

# N answers, F scalars, D width of the encoder, H hidden units (a quarter of D)

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from needle.artifacts import hash_file, write_bytes_atomic, write_json_atomic
from needle.errors import DataError

HEAD_VERSION = 1
HEAD_FILES = ("confidence.safetensors", "confidence.json")
REFIT = "fit it again: python -m needle.calibrate checkpoint={folder}; or delete both files to do without it"
Form = Literal["probability", "scalars", "encoder"]  # from the simplest to the largest
SCALARS = ("answer_log_odds", "mean_token_log_odds", "least_token_log_odds", "log_tokens", "calls", "log_tools")
# Beyond these an answer is hopeless, or certain to more digits than some hundred examples can tell apart.
LOG_ODDS_LOW, LOG_ODDS_HIGH = -20.0, 14.0
FEWEST_DEVIATION = 1e-6  # a feature that varies less is a constant
LBFGS_STEPS = 50  # enough for logistic regression to converge; the encoder form gains nothing from more


@dataclass(frozen=True)
class Evidence:
    """What the decoder knows of an answer. `token_log_probs`: of every token of the answer and of its end, in nats,
    under the student alone (the grammar masks tokens, it does not make the others likelier)."""

    prompt_state_D: np.ndarray
    token_log_probs: tuple[float, ...]
    calls: int
    tools: int

    def scalars(self) -> list[float]:
        """In the order of SCALARS."""
        total, tokens = sum(self.token_log_probs), len(self.token_log_probs)
        return [
            log_odds(total),
            log_odds(total / max(tokens, 1)),
            log_odds(min(self.token_log_probs, default=0.0)),
            math.log1p(tokens),
            float(self.calls),
            math.log1p(self.tools),
        ]


def log_odds(log_prob: float) -> float:
    """log(p / (1 - p)) of p = exp(log_prob), kept within LOG_ODDS_LOW and LOG_ODDS_HIGH."""
    if log_prob <= LOG_ODDS_LOW:
        return LOG_ODDS_LOW
    rest = -math.expm1(min(log_prob, 0.0))  # 1 - p
    return LOG_ODDS_HIGH if rest <= math.exp(-LOG_ODDS_HIGH) else log_prob - math.log(rest)


@dataclass(frozen=True)
class Features:
    """What heads read of N answers, in float64."""

    scalars_NF: Tensor
    states_ND: Tensor

    @staticmethod
    def of(evidence: Sequence[Evidence]) -> "Features":
        scalars = [one.scalars() for one in evidence]
        states = np.stack([one.prompt_state_D for one in evidence])
        return Features(torch.tensor(scalars, dtype=torch.float64), torch.from_numpy(states).double())

    def __len__(self) -> int:
        return len(self.scalars_NF)

    def take(self, index: np.ndarray) -> "Features":
        """The answers of an index or a mask."""
        chosen = torch.from_numpy(index)
        return Features(self.scalars_NF[chosen], self.states_ND[chosen])


class ConfidenceHead(nn.Module):
    """sigmoid(slope * logit + intercept). Forms: `probability` reads the answer's log-odds alone, `scalars` every one
    of SCALARS (logistic regression), `encoder` also the prompt's state through a ReLU layer.

    `facts` is what confidence.json says beside: how the answers were decoded, what the head was fitted on.
    """

    def __init__(self, *, form: Form, width: int, facts: Mapping[str, Any]):
        super().__init__()
        self.form, self.width, self.facts = form, width, dict(facts)
        self.scalars = 1 if form == "probability" else len(SCALARS)
        read = self.scalars + (width if form == "encoder" else 0)
        self.register_buffer("mean", torch.zeros(read))
        self.register_buffer("scale", torch.ones(read))
        self.register_buffer("slope", torch.ones(()))
        self.register_buffer("intercept", torch.zeros(()))
        # skip_init: whoever builds a head fills it, and torch's random state stays as it is.
        hidden = max(1, width // 4) if form == "encoder" else 0
        self.hidden = skip_init(nn.Linear, width, hidden) if hidden else None
        self.output = skip_init(nn.Linear, self.scalars + hidden, 1)
        self.double()

    def _read(self, features: Features) -> Tensor:
        scalars = features.scalars_NF[:, : self.scalars]
        return scalars if self.hidden is None else torch.cat((scalars, features.states_ND), dim=1)

    def standardise_by(self, features: Features) -> None:
        """Mean 0 and deviation 1 on these; constants stay as they are, at 0."""
        read = self._read(features)
        deviation = read.std(dim=0, correction=0)
        self.mean.copy_(read.mean(dim=0))
        self.scale.copy_(torch.where(deviation < FEWEST_DEVIATION, 1.0, deviation))

    def logits(self, features: Features) -> Tensor:
        """[N], before calibration."""
        read = (self._read(features) - self.mean) / self.scale
        if self.hidden is not None:
            scalars, states = read[:, : self.scalars], read[:, self.scalars :]
            read = torch.cat((scalars, self.hidden(states).relu()), dim=1)
        return self.output(read).squeeze(1)

    def forward(self, features: Features) -> Tensor:
        """[N]: the probability that an answer is right."""
        return torch.sigmoid(self.slope * self.logits(features) + self.intercept)

    @torch.no_grad()
    def confidences(self, evidence: Sequence[Evidence]) -> list[float]:
        return self(Features.of(evidence)).tolist() if evidence else []

    def fits(self, *, constrained: bool) -> bool:
        """Whether it was fitted on answers that were decoded so."""
        return self.facts.get("decoding", {}).get("constrained") == constrained

    def with_facts(self, facts: Mapping[str, Any]) -> "ConfidenceHead":
        self.facts = dict(facts)
        return self


def unchanged(*, width: int) -> ConfidenceHead:
    """The head that gives the student's own probability back (within the limits of `log_odds`)."""
    head = ConfidenceHead(form="probability", width=width, facts={})
    with torch.no_grad():
        head.output.weight.fill_(1.0)
        head.output.bias.zero_()
    return head


@dataclass(frozen=True)
class Candidate:
    """A head to try: its form, and how strongly its weights are drawn to 0."""

    form: Form
    l2: float

    def fit(self, features: Features, right_N: np.ndarray, *, seed: int) -> ConfidenceHead:
        """Minimises the mean log loss in nats plus l2 / 2 * |weights|^2 (biases are free), uncalibrated.

        L-BFGS over all answers at once, which has no learning rate to tune. `seed` starts the hidden layer.
        """
        head = ConfidenceHead(form=self.form, width=features.states_ND.shape[1], facts={})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in (head.hidden, head.output):
                if layer is not None:
                    nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                    nn.init.zeros_(layer.bias)
        head.standardise_by(features)
        target = torch.from_numpy(right_N).double()
        weights = [parameter for name, parameter in head.named_parameters() if name.endswith("weight")]
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(head.logits(features), target)
            loss = loss + 0.5 * self.l2 * torch.stack([weight.square().sum() for weight in weights]).sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        return head.requires_grad_(False)


@dataclass(frozen=True)
class _Record:
    """confidence.json. Hashes are SHA-256 of the files beside it."""

    schema_version: int
    form: str
    width: int
    scalars: list[str]
    student: str
    weights: str
    facts: dict[str, Any] = field(default_factory=dict)


def save_head(head: ConfidenceHead, folder: Path) -> None:
    """Writes the head beside a saved student, in place of an earlier one. Each file is replaced whole; a kill between
    the two leaves a pair that `load_head` refuses."""
    folder = Path(folder)
    tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
    weights, record = (folder / name for name in HEAD_FILES)
    write_bytes_atomic(weights, safetensors.torch.save(tensors))
    hashes = {"student": hash_file(folder / "model.safetensors"), "weights": hash_file(weights)}
    write_json_atomic(record, _Record(HEAD_VERSION, head.form, head.width, list(SCALARS), **hashes, facts=head.facts))


def remove_head(folder: Path) -> None:
    for name in HEAD_FILES:
        (Path(folder) / name).unlink(missing_ok=True)


def load_head(folder: Path) -> ConfidenceHead | None:
    """The head of the student in this folder; None where it has none.

    Raises:
        DataError: a file is damaged, or belongs to another student or another head.
    """
    weights, record_path = (Path(folder) / name for name in HEAD_FILES)
    there = [path for path in (weights, record_path) if path.is_file()]
    way_out = REFIT.format(folder=folder)
    if not there:
        return None
    if len(there) == 1:
        gone = record_path if there == [weights] else weights
        raise DataError(f"{there[0]} is half of a confidence head, {gone.name} is not there; {way_out}")
    record = _read_record(record_path, way_out)
    if hash_file(weights) != record.weights:
        raise DataError(f"{weights} is damaged, or is not the file that {record_path.name} describes; {way_out}")
    if hash_file(Path(folder) / "model.safetensors") != record.student:
        raise DataError(f"{record_path} belongs to another student than model.safetensors beside it; {way_out}")
    head = ConfidenceHead(form=record.form, width=record.width, facts=record.facts)
    try:
        head.load_state_dict(safetensors.torch.load_file(weights))
    except Exception as error:  # safetensors and torch each raise their own
        raise DataError(f"{weights} does not fit {record_path.name}: {error}; {way_out}") from error
    if not all(bool(tensor.isfinite().all()) for tensor in head.state_dict().values()):
        raise DataError(f"{weights} holds values that are not finite; {way_out}")
    return head.requires_grad_(False)


def _read_record(path: Path, way_out: str) -> _Record:
    try:
        read = json.loads(path.read_text("utf-8"))
        record = _Record(**{one.name: read[one.name] for one in dataclasses.fields(_Record)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} describes no confidence head ({type(error).__name__}: {error}); {way_out}") from error
    if record.schema_version != HEAD_VERSION or record.scalars != list(SCALARS):
        raise DataError(f"{path} has version {record.schema_version}, this code reads {HEAD_VERSION}; {way_out}")
    is_sound = isinstance(record.width, int) and record.width > 0 and isinstance(record.facts, dict)
    if record.form not in get_args(Form) or not is_sound:
        raise DataError(f"{path}: form={record.form!r} width={record.width!r} is no confidence head; {way_out}")
    return record
