"""A folder that `evaluate.load` reads; `needle.metrics.tool_call.FOLDER` is its path."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
