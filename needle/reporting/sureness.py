"""How sure a white-box teacher is of the recorded answers, token by token: the distributions that a divergence carries
to a student.

The teacher is forced along the recorded answer: at every token it has seen the right ones before.
Cost: a forward pass; three million parameters read two hundred answers in some seconds on one core.
"""

# R rows, T target tokens, V vocabulary

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from needle.data.packing import IGNORE, collate, network_inputs, pack
from needle.data.shards import About, Shard, ShardWriter
from needle.errors import DataError
from needle.metrics.calibration import auroc, ece_frac, log_loss_nats
from needle.schema import KINDS, Example
from needle.student import load
from needle.text.render import Span
from needle.text.tokenizer import TextCodec


def tokens(
    folder: Path, examples: Sequence[Example], *, source_row_tokens: int, target_row_tokens: int, rows_per_batch: int
) -> pd.DataFrame:
    """A line a target token: id, kind, place, span, token, label_prob and top_prob (0 to 1), top (the likeliest token),
    entropy_nats, agrees (the likeliest is the label).

    Raises:
        DataError: the folder holds no student, or an example is longer than a row.
    """
    model, codec = load(folder)
    texts = codec.texts()
    limits = {"source_row_tokens": source_row_tokens, "target_row_tokens": target_row_tokens}
    with tempfile.TemporaryDirectory() as temporary:
        shard = _shard(codec, examples, Path(temporary) / "shard")
        try:
            rows = pack(shard.source_lengths_N, shard.target_lengths_N, **limits)
        except ValueError as error:
            raise DataError(f"{error}; give longer rows or fewer tools") from None
        parts = []
        for start in range(0, len(rows), rows_per_batch):
            chosen = rows[start : start + rows_per_batch]
            parts += _batch(model, shard, chosen, examples, texts, limits)
    found = pd.concat(parts, ignore_index=True)
    return found.sort_values(["example", "place"], ignore_index=True).drop(columns="example")


def _shard(codec: TextCodec, examples: Sequence[Example], folder: Path) -> Shard:
    writer = ShardWriter()
    for example in examples:
        target, spans = codec.encode_target(example.calls, example.tools)
        about = About(KINDS.index(example.kind), 0, len(example.tools))
        writer.add(example.id, codec.encode_prompt(example.query, example.tools), target, spans, about)
    writer.save(folder)
    return Shard.open(folder)


@torch.inference_mode()
def _batch(model, shard: Shard, rows, examples: Sequence[Example], texts: Sequence[str], limits) -> list[pd.DataFrame]:
    batch = collate(shard, rows, **limits)
    log_probs_RTV = model(**network_inputs(batch)).logits.float().log_softmax(dim=-1)
    labels_RT = batch["labels_RT"]
    label_RT = log_probs_RTV.gather(-1, labels_RT.clamp_min(0)[..., None])[..., 0].exp().numpy()
    entropy_RT = -(log_probs_RTV.exp() * log_probs_RTV).nan_to_num().sum(dim=-1).numpy()
    top_RT, chosen_RT = (one.numpy() for one in log_probs_RTV.max(dim=-1))
    found = []
    for r, row in enumerate(rows):
        for segment, number in enumerate(row, 1):
            places = np.flatnonzero((batch["target_segments_RT"][r] == segment).numpy())
            labels = labels_RT[r, places].numpy()
            assert (labels != IGNORE).all()
            found.append(
                pd.DataFrame(
                    {
                        "example": number,
                        "id": examples[number].id,
                        "kind": examples[number].kind,
                        "place": np.arange(len(places)),
                        "span": [Span(int(one)).name.lower() for one in batch["spans_RT"][r, places]],
                        "token": [texts[one] for one in labels],
                        "label_prob": label_RT[r, places],
                        "top": [texts[one] for one in chosen_RT[r, places]],
                        "top_prob": np.exp(top_RT[r, places]),
                        "entropy_nats": np.maximum(entropy_RT[r, places], 0),
                        "agrees": chosen_RT[r, places] == labels,
                    }
                )
            )
    return found


def by_span(found: pd.DataFrame, *, bins: int) -> pd.DataFrame:
    """For each span of the answer and all of it: tokens, how often the label is the likeliest (%), mean probability of
    the likeliest (%), their calibration error (points), cross-entropy with the label and entropy (nats), and auroc: how
    well the probability tells tokens where teacher and label agree from the others."""
    lines = {}
    for name in (*dict.fromkeys(found["span"]), "all"):
        some = found if name == "all" else found[found["span"] == name]
        sure, agrees = some["top_prob"].to_numpy(), some["agrees"].to_numpy()
        lines[name] = {
            "tokens": len(some),
            "label is likeliest, %": 100 * agrees.mean(),
            "mean top probability, %": 100 * sure.mean(),
            "calibration error, points": 100 * ece_frac(sure, agrees, bins=bins),
            "cross-entropy, nats": float(-np.log(some["label_prob"].clip(lower=1e-12)).mean()),
            "entropy, nats": some["entropy_nats"].mean(),
            "log loss of agreement, nats": log_loss_nats(sure, agrees),
            "auroc": auroc(sure, agrees),
        }
    return pd.DataFrame(lines).T


def disagreements(found: pd.DataFrame, examples: Sequence[Example], *, count: int) -> pd.DataFrame:
    """The first token of an answer at which the teacher would have written another, the surest first: request, answer
    so far, label, teacher's token and the probabilities of both."""
    by_id = {example.id: example for example in examples}
    lines = []
    for name, some in found.groupby("id", sort=False):
        wrong = some[~some["agrees"]]
        if len(wrong):
            first = wrong.iloc[0]
            so_far = "".join(some["token"][some["place"] < first["place"]])
            lines.append(
                {
                    "request": by_id[str(name)].query,
                    "answer so far": so_far,
                    "label": first["token"],
                    "teacher": first["top"],
                    "span": first["span"],
                    "P(teacher's)": round(float(first["top_prob"]), 3),
                    "P(label)": round(float(first["label_prob"]), 3),
                }
            )
    table = pd.DataFrame(lines, columns=list(lines[0]) if lines else None)
    return table.sort_values("P(teacher's)", ascending=False, ignore_index=True).head(count) if lines else table
