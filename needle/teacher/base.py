"""What a teacher can give, and the check that a loss asks for no more."""

from collections.abc import Iterable
from typing import ClassVar, Protocol

from needle.errors import ConfigError

# text: one answer. samples: several, with weights. top_k: log-probabilities of the likeliest tokens at every position.
# full_logits: of all tokens. live: can score the student's own output while it trains.
CAPABILITIES = ("text", "samples", "top_k", "full_logits", "live")


class Teacher(Protocol):
    capabilities: ClassVar[frozenset[str]]


def check_legal(*, loss_name: str, needs: Iterable[str], teacher_name: str, capabilities: Iterable[str]) -> None:
    """Raises ConfigError with the legal routes when the loss needs what the teacher cannot give."""
    lacking = sorted(set(needs) - set(capabilities), key=CAPABILITIES.index)
    if not lacking:
        return
    routes = {
        "top_k": "use loss=hard_label (cross-entropy with the recorded answers), or teacher=checkpoint after "
        "`python -m needle.signals teacher=checkpoint`",
        "full_logits": "use a loss over top_k, or teacher=checkpoint",
        "live": "use teacher=checkpoint",
        "samples": "use loss=hard_label, or a teacher that samples",
        "text": "use teacher=recorded",
    }
    raise ConfigError(
        f"loss={loss_name} needs {', '.join(lacking)}; teacher={teacher_name} gives {', '.join(sorted(capabilities))}: "
        f"{routes[lacking[0]]}"
    )
