"""What stages print for people: tables without trailing blanks, text that fits, and silence inside of larger work."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType

# In a log a line may be long; a terminal has its own width.
LOG_WIDTH = 140
_silent = False


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, progress and summaries of single runs are not printed: whoever runs many of them tells of them."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


def is_quiet() -> bool:
    return _silent


def show(thing: RenderableType) -> None:
    """Prints a table or a text, wrapped to the terminal or to LOG_WIDTH."""
    if sys.stdout.isatty():
        Console().print(thing, highlight=False)
        return
    console = Console(width=LOG_WIDTH, color_system=None, force_jupyter=False)  # in a notebook, too, it is text
    with console.capture() as captured:
        console.print(thing, highlight=False, markup=False)
    print("\n".join(line.rstrip() for line in captured.get().rstrip().splitlines()), flush=True)


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 3.2 min, 1.4 hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"
