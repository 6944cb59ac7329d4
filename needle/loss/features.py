"""What terms that compare inner layers share: which layers go together, and the taps on both networks."""

# R rows, S source tokens, T target tokens

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from needle.errors import ConfigError
from needle.student.taps import Part, Point, Taps, What, depths

Layers = tuple[Annotated[int, Field(ge=1)], ...]
SEGMENTS = {"encoder": "source_segments_RS", "decoder": "target_segments_RT"}


# last: the last layers of both. even: every layer of the shallower network, with the layer as far up in the other.
# Lists: layers that go together, one by one, counted from 1.
LayerMap = Literal["last", "even"] | Mapping[Literal["student", "teacher"], Layers] | None


class Pair(NamedTuple):
    part: Part
    student: int
    teacher: int


def check_maps(**maps: LayerMap) -> None:
    """Raises ValueError when maps name no layer or do not pair them, whatever the networks."""
    if not any(maps.values()):
        raise ValueError(f"{' and '.join(maps)} are null: nothing would be compared; give one last, even or layers")
    for name, layer_map in maps.items():
        if isinstance(layer_map, Mapping):
            if set(layer_map) != {"student", "teacher"}:
                raise ValueError(f"{name} names layers of {' and '.join(layer_map)}: it needs student and teacher")
            mine, others = layer_map["student"], layer_map["teacher"]
            if len(mine) != len(others) or not mine:
                raise ValueError(
                    f"{name}: {len(mine)} student layers and {len(others)} teacher layers; name as many of each, at "
                    "least one"
                )
            if len(set(zip(mine, others, strict=True))) != len(mine):
                raise ValueError(f"{name}: a pair of layers is there twice")


def resolve(layer_map: LayerMap, *, part: Part, student_layers: int, teacher_layers: int) -> list[Pair]:
    """The pairs of one part, for networks of these depths.

    even: with n the smaller depth, pair j of n is layer round(j * depth / n) of each network, so that both end at their
    last layer and no layer is used twice (the uniform map of Jiao et al. 2020).

    Raises:
        ConfigError: a layer is named that a network does not have.
    """
    if layer_map is None:
        return []
    if layer_map == "last":
        return [Pair(part, student_layers, teacher_layers)]
    if layer_map == "even":
        n = min(student_layers, teacher_layers)
        return [Pair(part, _rounded(j * student_layers, n), _rounded(j * teacher_layers, n)) for j in range(1, n + 1)]
    for whose, depth in (("student", student_layers), ("teacher", teacher_layers)):
        beyond = [layer for layer in layer_map[whose] if layer > depth]
        if beyond:
            raise ConfigError(
                f"{part}.{whose}={list(layer_map[whose])}: there is no layer {beyond[0]}; the student's {part} has "
                f"{student_layers} layers, the teacher's {teacher_layers}. Name layers from 1, or use last or even"
            )
    return [Pair(part, *layers) for layers in zip(layer_map["student"], layer_map["teacher"], strict=True)]


def _rounded(numerator: int, denominator: int) -> int:
    """To the nearest whole number, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


class MappedLayers:
    """The pairs of a student's and a teacher's layers, tapped at `whats`.

    Raises:
        ConfigError: there is no teacher, or a layer that it or the student does not have.
    """

    def __init__(
        self,
        maps: Mapping[Part, LayerMap],
        whats: Sequence[What],
        *,
        student: nn.Module,
        teacher: nn.Module | None,
    ):
        if teacher is None:
            raise ConfigError("layers are compared with a teacher's network; take one that has it: teacher=checkpoint")
        mine, others = depths(student), depths(teacher)
        self.pairs = [
            pair
            for part, layer_map in maps.items()
            for pair in resolve(layer_map, part=part, student_layers=mine[part], teacher_layers=others[part])
        ]
        self.whats = tuple(whats)
        self.student_taps, self.teacher_taps = (
            Taps(network, [Point(pair.part, getattr(pair, whose), what) for pair in self.pairs for what in self.whats])
            for network, whose in ((student, "student"), (teacher, "teacher"))
        )

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Real tokens, once for every pair of layers that they pass."""
        tokens = {part: (batch[name] > 0).sum() for part, name in SEGMENTS.items()}
        return sum((tokens[pair.part] for pair in self.pairs), start=batch["labels_RT"].new_zeros(()))

    def read(self, *, student_outputs: Any, teacher_outputs: Any) -> Iterator[tuple[Pair, What, Tensor, Tensor]]:
        """Every pair at every `what`: the student's tensor, the teacher's."""
        mine, others = self.student_taps.of(student_outputs), self.teacher_taps.of(teacher_outputs)
        for pair in self.pairs:
            for what in self.whats:
                student = mine[Point(pair.part, pair.student, what)]
                yield pair, what, student, others[Point(pair.part, pair.teacher, what)]
