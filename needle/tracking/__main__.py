"""Sends the offline runs under a folder to W&B, those that made something before those that read it.

    python -m needle.tracking runs

It is `wandb sync` of one stage after the other: within one call the order is W&B's. What was sent before is left out.
The server is WANDB_BASE_URL, wandb.ai without it; the key comes from WANDB_API_KEY.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Patterns under the folder of all runs, makers first.
STAGES = ("lineage/*/*/corpus-*", "lineage/*/*/shards-*", "lineage/*/*/signals-*", "train/*", "lineage/*/*/report-*")


def stages(root: Path) -> Iterator[list[str]]:
    """The offline runs of each stage that has some."""
    for pattern in STAGES:
        found = sorted(root.glob(f"{pattern}/wandb/offline-run-*"))
        if found:
            yield [str(path) for path in found]


def main(words: list[str]) -> None:
    if len(words) != 1 or not Path(words[0]).is_dir():
        sys.exit("needle.tracking: name the folder of all runs: python -m needle.tracking runs")
    if not os.environ.get("WANDB_API_KEY"):
        sys.exit("needle.tracking: the environment has no WANDB_API_KEY; export it")
    os.environ.pop("WANDB_MODE", None)  # offline is where these runs come from
    from wandb.cli.cli import cli

    for paths in stages(Path(words[0])):
        try:
            cli.main(["sync", *paths], prog_name="wandb")
        except SystemExit as end:  # as a command line does, well or not
            if end.code:
                raise


if __name__ == "__main__":
    main(sys.argv[1:])
