"""The bench as a user starts it, at a size of seconds; its figures are checked for consistency, never for speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ["batch.rows=2", "batch.source_tokens=32", "batch.target_tokens=16", "vocab_size=400", "threads=1"]
FEW = ["compile=false", "warmup=1", "repeats=1", "decode_tokens=4"]


def test_bench_prints_and_writes_its_figures(repository: Path, tmp_path: Path):
    output = tmp_path / "figures.json"
    command = [sys.executable, "-m", "needle.bench", "student=san_nano", *SMALL, *FEW, "operations=3"]
    done = subprocess.run(
        [*command, f"output={output}"], cwd=repository, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())
    assert figures["vocabulary"] == 400
    assert figures["training_tokens_per_s"] == pytest.approx(2 * 48 / figures["whole_step_s"], rel=0.01)
    shares = figures["step_time_share"]
    assert len(shares) == 4
    assert sum(shares.values()) == pytest.approx(1, abs=0.001)
    for name in ("sgemm_gflop_per_s", "decoding_tokens_per_s", *shares):
        assert name in done.stdout
