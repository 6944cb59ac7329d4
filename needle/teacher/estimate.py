"""What questions would cost before they are asked, from answers of the same teacher that are known already."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from needle.teacher.base import AskedTeacher, TeacherCall, TeacherReply
from needle.teacher.ledger import Ledger

# Of a normal distribution: the half-width of a 95% interval in standard errors.
Z_95 = 1.96
SAMPLE_MAX = 1000


@dataclass(frozen=True)
class Estimate:
    """`calls` questions, of which `known` are answered. `mean_*` are of one answer, from `sample` answers; `low_usd`
    and `high_usd` hold the expected cost with 95%; `most_usd` is the bound by the price table and the limits."""

    calls: int
    known: int
    sample: int
    mean_prompt_tokens: float
    mean_output_tokens: float
    mean_thinking_tokens: float
    mean_usd: float
    low_usd: float
    high_usd: float
    most_usd: float

    @property
    def to_buy(self) -> int:
        return self.calls - self.known

    def text(self) -> str:
        lines = [
            f"questions: {self.calls:,}; {self.known:,} are answered in the ledger, {self.to_buy:,} would be bought",
            f"at most ${self.most_usd:,.4f}, if every answer were as long as its limit allows and came at the first "
            "attempt",
        ]
        if not self.sample:
            lines.append("no answer of this teacher is known: dry_run_calls=10 buys ten to estimate from")
            return "\n".join(lines)
        tokens = (self.mean_prompt_tokens, self.mean_output_tokens, self.mean_thinking_tokens)
        each = "{:,.1f} prompt, {:,.1f} output and {:,.1f} thinking tokens".format(*tokens)
        total = "{:,.0f} prompt, {:,.0f} output and {:,.0f} thinking tokens".format(*(self.to_buy * t for t in tokens))
        return "\n".join(
            [
                *lines,
                f"sample: {self.sample:,} answers with {each} on average, ${self.mean_usd:.6f} each",
                f"expected: {self.to_buy:,} calls, {total}, ${self.to_buy * self.mean_usd:,.4f} (95% interval "
                f"${self.low_usd:,.4f} to ${self.high_usd:,.4f})",
            ]
        )


def estimate(
    calls: Iterable[TeacherCall], *, teacher: AskedTeacher, ledger: Ledger, expected_calls: int | None
) -> Estimate:
    """From the known answers to these very questions, or else from others of the same provider, model and role.

    `expected_calls`: how many there will be where `calls` are only the first of them; null: they are all.
    """
    count = known = 0
    most_usd = 0.0
    sample: list[TeacherReply] = []
    example: TeacherCall | None = None
    for call in calls:
        count += 1
        example = example or call
        reply = ledger.get(call.key())
        if reply is None:
            most_usd += teacher.most_usd(call)
        else:
            known += 1
            if len(sample) < SAMPLE_MAX:
                sample.append(reply)
    if example is not None and not sample:
        sample = ledger.sample(example, SAMPLE_MAX)
    if expected_calls is not None and count:
        most_usd *= expected_calls / count
        count = expected_calls
    return _estimate(count, known, sample, most_usd)


def _estimate(count: int, known: int, sample: Sequence[TeacherReply], most_usd: float) -> Estimate:
    n = len(sample)
    costs = [reply.cost_usd for reply in sample]
    mean_usd = sum(costs) / n if n else 0.0
    variance = sum((cost - mean_usd) ** 2 for cost in costs) / (n - 1) if n > 1 else 0.0
    to_buy = count - known
    error_usd = Z_95 * to_buy * math.sqrt(variance / n) if n else 0.0
    return Estimate(
        calls=count,
        known=known,
        sample=n,
        mean_prompt_tokens=sum(r.prompt_tokens for r in sample) / max(n, 1),
        mean_output_tokens=sum(r.output_tokens for r in sample) / max(n, 1),
        mean_thinking_tokens=sum(r.thinking_tokens for r in sample) / max(n, 1),
        mean_usd=mean_usd,
        low_usd=max(0.0, to_buy * mean_usd - error_usd),
        high_usd=to_buy * mean_usd + error_usd,
        most_usd=most_usd,
    )
