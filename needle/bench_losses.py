"""What each loss and each term beside it costs a training step, next to hard labels, at the base size.

    python -m needle.bench_losses                         # make bench-losses; about a minute a loss
    python -m needle.bench_losses settings=[loss=reverse_kl,"loss=taid loss.distribution=full"]

Every setting is timed by `needle.bench` in a process of its own, so that peak memory is its own, in several rounds
through all of them: a machine that others use is slow for a while, and the ratio to the same round's hard labels is
what is told, as a median over rounds.
"""

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from needle import config
from needle.artifacts import write_json_atomic
from needle.errors import DataError
from needle.progress import Progress

BASELINE = "loss=hard_label"


def all_settings() -> list[str]:
    """Hard labels first, every other loss in each form that it has, every auxiliary beside hard labels."""
    settings = [BASELINE]
    for path in sorted((config.CONF / "loss").glob("*.yaml")):
        name = f"loss={path.stem}"
        if name != BASELINE:
            settings.append(name)
        if "\ndistribution:" in path.read_text("utf-8"):
            settings.append(f"{name} loss.distribution=full")
    for path in sorted((config.CONF / "auxiliary").glob("*.yaml")):
        head = " student.retrieval_width=128" if path.stem == "contrastive" else ""
        settings.append(f"auxiliary=[{path.stem}]{head}")
    return settings


def measure(setting: str, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Raises DataError with the bench's own message when the setting does not run."""
    output = folder / "figures.json"
    command = [sys.executable, "-m", "needle.bench", *overrides, *shlex.split(setting), f"output={output}"]
    done = subprocess.run([*command, "decode_tokens=0"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"{setting}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'it failed'}")
    return json.loads(output.read_text("utf-8"))


def table(rounds: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row a setting: medians over rounds, times as ratios to the same round's hard labels."""
    rows = []
    for setting in rounds[0]:
        runs = [figures[setting] for figures in rounds]
        ratios = [figures[setting]["whole_step_s"] / figures[BASELINE]["whole_step_s"] for figures in rounds]
        more = [figures[setting]["peak_memory_mib"] - figures[BASELINE]["peak_memory_mib"] for figures in rounds]
        rows.append(
            {
                "setting": setting,
                "step_s": statistics.median(run["whole_step_s"] for run in runs),
                "time_ratio": round(statistics.median(ratios), 3),
                "time_ratio_min": round(min(ratios), 3),
                "time_ratio_max": round(max(ratios), 3),
                "peak_memory_mib": statistics.median(run["peak_memory_mib"] for run in runs),
                "more_memory_mib": round(statistics.median(more), 1),
            }
        )
    return rows


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    width = max(len(row["setting"]) for row in rows)
    lines = [f"{'setting':{width}}  step s  x hard labels (rounds)      peak MiB  more MiB"]
    for row in rows:
        spread = f"{row['time_ratio']:.2f} ({row['time_ratio_min']:.2f} to {row['time_ratio_max']:.2f})"
        memory = f"{row['peak_memory_mib']:8.0f}  {row['more_memory_mib']:+8.0f}"
        lines.append(f"{row['setting']:{width}}  {row['step_s']:6.3f}  {spread:24}  {memory}")
    return "\n".join(lines)


@config.stage("bench_losses")
def main(
    cfg: dict[str, Any],
    *,
    settings: tuple[str, ...] | None,
    bench: tuple[str, ...],
    rounds: Annotated[int, Field(ge=1)],
    output: Path | None,
) -> None:
    chosen = list(dict.fromkeys([BASELINE, *(settings or all_settings())]))
    measured: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder, Progress("times") as progress:
        for number in range(rounds):
            measured.append({})
            for place, setting in enumerate(chosen, 1):
                measured[-1][setting] = measure(setting, bench, Path(folder))
                progress.update(number * len(chosen) + place, rounds * len(chosen), setting)
    rows = table(measured)
    print(as_text(rows))
    if output is not None:
        first = measured[0][BASELINE]
        about = {name: first[name] for name in ("student", "parameters", "threads", "compiled", "sgemm_gflop_per_s")}
        write_json_atomic(output, {**about, "rounds": rounds, "bench": list(bench), "rows": rows})


if __name__ == "__main__":
    main()
