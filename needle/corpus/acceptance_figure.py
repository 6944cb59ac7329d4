"""What each check refuses, as PNG bytes: a bar a check, its share of the examples that it can judge."""

import io
from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from needle.corpus.plan_figures import STYLE
from needle.corpus.validate import Validation

# Okabe & Ito 2008, told apart without colour vision.
COUNTED_COLOUR, SET_ASIDE_COLOUR = "#56B4E9", "#D55E00"


def draw(counts: Mapping[str, Mapping[str, int]], validation: Validation) -> bytes:
    """`counts`: check -> passed, failed, not_applicable, as needle.corpus.validate.Sifted has them."""
    names = list(counts)
    judged = [counts[name]["passed"] + counts[name]["failed"] for name in names]
    shares = [100 * counts[name]["failed"] / max(n, 1) for name, n in zip(names, judged, strict=True)]
    set_aside = [validation.action(name) == "quarantine" for name in names]
    with mpl.rc_context({**STYLE, "legend.frameon": False}):
        figure = Figure(figsize=(7.5, 1.3 + 0.27 * len(names)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        at = range(len(names))
        axes.barh(at, shares, height=0.7, color=[SET_ASIDE_COLOUR if s else COUNTED_COLOUR for s in set_aside])
        for i, (name, n) in enumerate(zip(names, judged, strict=True)):
            label = f" {counts[name]['failed']:,} of {n:,}" if n else " nothing to judge"
            axes.text(shares[i], i, label, va="center", color="#444444")
        axes.set_yticks(at, [name.replace("_", " ") for name in names])
        axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, max([*shares, 1.0]) * 1.3), xlabel="examples that fail, %")
        legend = {"counted": COUNTED_COLOUR, "set aside": SET_ASIDE_COLOUR}
        patches = [Patch(color=colour, label=label) for label, colour in legend.items()]
        axes.legend(handles=patches, loc="lower right")
        figure.suptitle("Failures by check", x=0.01, ha="left", weight="bold", fontsize=12)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
