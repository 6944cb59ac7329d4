"""What a loss is: which teacher signals it needs, and its value at every target token; and what is added beside it."""

# R rows, T target tokens, V vocabulary, K stored teacher tokens

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from needle.loss.schedule import Schedule

IGNORE = -100


class LossTerms(NamedTuple):
    """A weighted sum in nats and the sum of the weights, apart, so that only the caller divides: accumulation over
    micro-batches, devices and packed rows then gives the same mean."""

    sum_nats: Tensor
    weight: Tensor


class Loss(Protocol):
    """A loss is called with keyword tensors only and returns nats [R, T], 0 where labels are ignored.

    `needs`: of needle.teacher.base.CAPABILITIES. They decide which signals come, and a loss takes what else there is
    as `**_`:

        text         labels_RT, -100 where ignored
        samples      the same, one packed example for each distinct answer, weighed by its share
        top_k        teacher_ids_RTK, teacher_log_probs_RTK (at the loss's `temperature`; all -inf where the teacher
                     says nothing: finite values are asked for there, the caller puts the label's in their place)
        full_logits  teacher_logits_RTV, not tempered

    Always there: progress, the share of the training that is behind, 0 to 1, a scalar tensor.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, *, student_logits_RTV: Tensor, labels_RT: Tensor, **signals: Tensor) -> Tensor: ...


class StatefulLoss(Loss, Protocol):
    """A loss that adapts to how training goes. Its state is a tensor that the caller keeps, checkpoints, and passes as
    `state`; one step's micro-batches share it."""

    def initial_state(self) -> Tensor: ...

    def next_state(self, state: Tensor, *, mean_nats: Tensor, progress: float) -> Tensor:
        """`mean_nats`: this loss's weighted mean over the batch of the step that has just ended."""
        ...


class Auxiliary(nn.Module):
    """A term beside the loss, attached to one student and, where it needs one, a teacher's network.

    It holds what it learns itself (projections, temperatures), which is optimised and checkpointed with the student
    but not part of it. It may hook the networks that it is attached to.
    """

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """How many units (tokens, examples) the sum goes over: from the data alone, so that micro-batches of a batch
        can be divided by the whole batch's."""
        raise NotImplementedError

    def forward(
        self, *, batch: Mapping[str, Tensor], student: nn.Module, student_outputs: Any, teacher_outputs: Any
    ) -> Tensor:
        """The sum over units, a scalar, in nats or as the class says. `student` is the network that gave
        `student_outputs`; `teacher_outputs` is None where the term needs no network."""
        raise NotImplementedError


class AuxiliarySettings(Protocol):
    """What conf/auxiliary states; `weight` multiplies the term's mean."""

    @property
    def needs(self) -> frozenset[str]: ...

    weight: Schedule

    def attach(self, *, student: nn.Module, teacher: nn.Module | None) -> Auxiliary: ...


def reduce(*, nats_RT: Tensor, weights_RT: Tensor) -> LossTerms:
    """`weights_RT` is 0 at padding."""
    return LossTerms((nats_RT * weights_RT).sum(), weights_RT.sum())
