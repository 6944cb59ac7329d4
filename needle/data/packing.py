"""Packing: several examples a row, attention kept inside each by segment numbers, so that little of a batch is padding.

An example has a source and a target length, so this is bin packing in two dimensions. Best fit within windows of
shuffled examples keeps the order random while padding stays at a few percent.
"""

# R rows, S source row tokens, T target row tokens, K stored teacher tokens

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from needle.data.curriculum import Stretch
from needle.data.shards import Shard
from needle.text.tokenizer import BOS, PAD

IGNORE = -100


def pack(
    source_lengths_N: np.ndarray, target_lengths_N: np.ndarray, *, source_row_tokens: int, target_row_tokens: int
) -> list[list[int]]:
    """Rows of example indices; every example that fits a row is in exactly one.

    Row by row, each taking the example that fits and is most alike the room left (the dot-product rule for vector bin
    packing, Panigrahy et al. 2011), which fills both dimensions together.

    Raises:
        ValueError: an example is longer than a row.
    """
    if len(source_lengths_N) == 0:
        return []
    shares_N2 = np.stack([source_lengths_N / source_row_tokens, target_lengths_N / target_row_tokens], axis=1)
    if shares_N2.max() > 1:
        worst = int(shares_N2.max(axis=1).argmax())
        raise ValueError(
            f"an example of {source_lengths_N[worst]} source and {target_lengths_N[worst]} target tokens does not fit "
            f"a row of {source_row_tokens} and {target_row_tokens}"
        )
    rows: list[list[int]] = []
    waiting = np.arange(len(shares_N2))
    while len(waiting):
        room = np.ones(2)
        row: list[int] = []
        shares = shares_N2[waiting]
        while (fits := (shares <= room + 1e-9).all(axis=1)).any():
            chosen = int(np.where(fits, shares @ room, -1.0).argmax())
            row.append(int(waiting[chosen]))
            room -= shares[chosen]
            waiting, shares = np.delete(waiting, chosen), np.delete(shares, chosen, axis=0)
        rows.append(row)
    return rows


def collate(
    shard: Shard,
    rows: Sequence[Sequence[int]],
    *,
    source_row_tokens: int,
    target_row_tokens: int,
    beside: Shard | None = None,
) -> dict[str, Tensor]:
    """A batch of packed rows. Indices from len(shard) on are examples of `beside`; where `shard` has signals and
    `beside` has none, its tokens get log-probabilities of -inf throughout: the teacher says nothing there.

    Returns:
        source_ids_RS, source_segments_RS, decoder_ids_RT, target_segments_RT, labels_RT (-100 for padding), spans_RT;
        what `About` says of a token's example: kinds_RT, answer_weights_RT, confidences_RT, and gold_tools_RS at its
        source tokens; with signals teacher_ids_RTK and teacher_log_probs_RTK (nats). Segments count from 1; 0 is
        padding.
    """
    shape_S, shape_T = (len(rows), source_row_tokens), (len(rows), target_row_tokens)
    source, source_segments = np.full(shape_S, PAD, np.int64), np.zeros(shape_S, np.int64)
    decoder, target_segments = np.full(shape_T, PAD, np.int64), np.zeros(shape_T, np.int64)
    labels, spans = np.full(shape_T, IGNORE, np.int64), np.zeros(shape_T, np.int64)
    kinds, gold_tools = np.zeros(shape_T, np.int64), np.zeros(shape_S, np.int64)
    answer_weights, confidences = np.ones(shape_T, np.float32), np.ones(shape_T, np.float32)
    signals = shard.signals
    if signals is not None:
        teacher_ids = np.zeros((*shape_T, signals.ids_XK.shape[1]), np.int64)
        teacher_log_probs = np.zeros((*shape_T, signals.ids_XK.shape[1]), np.float32)
    for r, row in enumerate(rows):
        s = t = 0
        for segment, number in enumerate(row, 1):
            of, index = (shard, number) if beside is None or number < len(shard) else (beside, number - len(shard))
            source_slice = slice(*of.source_offsets[index : index + 2])
            target_slice = slice(*of.target_offsets[index : index + 2])
            tokens, answer = of.source[source_slice], of.target[target_slice]
            s_end, t_end = s + len(tokens), t + len(answer)
            source[r, s:s_end], source_segments[r, s:s_end] = tokens, segment
            decoder[r, t], decoder[r, t + 1 : t_end] = BOS, answer[:-1]
            labels[r, t:t_end], target_segments[r, t:t_end] = answer, segment
            spans[r, t:t_end] = of.spans[target_slice]
            kinds[r, t:t_end], gold_tools[r, s:s_end] = of.kind[index], of.gold_tools[index]
            answer_weights[r, t:t_end] = of.answer_weight[index]
            confidences[r, t:t_end] = of.confidence[index]
            if signals is not None and of.signals is not None:
                teacher_ids[r, t:t_end] = of.signals.ids_XK[target_slice]
                teacher_log_probs[r, t:t_end] = of.signals.log_probs_XK[target_slice]
            elif signals is not None:
                teacher_log_probs[r, t:t_end] = -np.inf
            s, t = s_end, t_end
    batch = {
        "source_ids_RS": source,
        "source_segments_RS": source_segments,
        "decoder_ids_RT": decoder,
        "target_segments_RT": target_segments,
        "labels_RT": labels,
        "spans_RT": spans,
        "kinds_RT": kinds,
        "answer_weights_RT": answer_weights,
        "confidences_RT": confidences,
        "gold_tools_RS": gold_tools,
    }
    if signals is not None:
        batch |= {"teacher_ids_RTK": teacher_ids, "teacher_log_probs_RTK": teacher_log_probs}
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def network_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A packed batch as the keyword arguments of a student."""
    return {
        "input_ids": batch["source_ids_RS"],
        "source_segments_BS": batch["source_segments_RS"],
        "decoder_input_ids": batch["decoder_ids_RT"],
        "target_segments_BT": batch["target_segments_RT"],
    }


class PackedBatches:
    """An endless, seeded stream of packed batches that can continue where it was.

    Epoch e is a permutation of the examples that depends on (seed, e) only, packed window by window; a stream that
    starts at batch n yields exactly what one from the beginning yields after n batches. With `stretches` (see
    Curriculum) each has epochs of its own, and rows that fill no batch at its end are left out; indices of theirs from
    len(shard) on are examples of `beside`.
    """

    def __init__(
        self,
        shard: Shard,
        *,
        rows_per_batch: int,
        source_row_tokens: int,
        target_row_tokens: int,
        window_examples: int,
        seed: int,
        stretches: Sequence[Stretch] = (),
        beside: Shard | None = None,
    ):
        if len(shard) == 0:
            raise ValueError("a shard without examples gives no batches")
        self.shard, self.rows_per_batch, self.window_examples, self.seed = shard, rows_per_batch, window_examples, seed
        self.shape = {"source_row_tokens": source_row_tokens, "target_row_tokens": target_row_tokens}
        self.stretches, self.beside = tuple(stretches) or (Stretch.whole(shard),), beside
        self.source_lengths_N, self.target_lengths_N = shard.source_lengths_N, shard.target_lengths_N
        if beside is not None:
            self.source_lengths_N = np.concatenate([self.source_lengths_N, beside.source_lengths_N])
            self.target_lengths_N = np.concatenate([self.target_lengths_N, beside.target_lengths_N])
        self.rank, self.ranks = 0, 1
        self.first_batch = 0

    def share(self, *, rank: int, ranks: int) -> None:
        """Gives this process the rows rank, rank + ranks, ... of every batch: together the ranks see one batch."""
        self.rank, self.ranks = rank, ranks

    def start_at(self, batch: int) -> None:
        """Makes the next iteration begin with batch number `batch`, counted from 0."""
        self.first_batch = batch

    def rows_of_epoch(self, epoch: int, *, place: int = -1) -> list[list[int]]:
        """Of the stretch at `place`; of the last one where nothing is said."""
        stretch = self.stretches[place]
        rng = stretch.generator(self.seed, epoch)
        order_N = stretch.order(rng, seed=self.seed, epoch=epoch)
        rows: list[list[int]] = []
        for start in range(0, len(order_N), self.window_examples):
            window = order_N[start : start + self.window_examples]
            packed = pack(self.source_lengths_N[window], self.target_lengths_N[window], **self.shape)
            rows += [[int(window[i]) for i in packed[j]] for j in rng.permutation(len(packed))]
        return rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        skip = self.first_batch
        for place, stretch in enumerate(self.stretches):
            if stretch.batches is not None and skip >= stretch.batches:
                skip -= stretch.batches
                continue
            left = None if stretch.batches is None else stretch.batches - skip
            for rows in islice(self._batches(place, skip), left):
                yield collate(self.shard, rows[self.rank :: self.ranks], **self.shape, beside=self.beside)
            skip = 0

    def _batches(self, place: int, skip: int) -> Iterator[list[list[int]]]:
        """A stretch's batches without end, as rows, from number `skip`."""
        epoch = 0
        carried: list[list[int]] = []
        while True:
            rows = carried + self.rows_of_epoch(epoch, place=place)
            whole = len(rows) // self.rows_per_batch
            for b in range(min(skip, whole), whole):
                yield rows[b * self.rows_per_batch : (b + 1) * self.rows_per_batch]
            skip -= min(skip, whole)
            carried = rows[whole * self.rows_per_batch :]
            epoch += 1


def padding_frac(
    rows: Sequence[Sequence[int]], shard: Shard, *, source_row_tokens: int, target_row_tokens: int
) -> dict[str, float]:
    """Share of slots that hold no token: of source rows, of target rows, and of both together."""
    packed = [index for row in rows for index in row]
    used_S, used_T = int(shard.source_lengths_N[packed].sum()), int(shard.target_lengths_N[packed].sum())
    slots_S, slots_T = len(rows) * source_row_tokens, len(rows) * target_row_tokens
    return {
        "source": 1 - used_S / slots_S,
        "target": 1 - used_T / slots_T,
        "all": 1 - (used_S + used_T) / (slots_S + slots_T),
    }
