"""Turns the split corpus into training shards: augmentation, tokenizer, tokens.

    python -m needle.prepare data=default

Writes artifacts/shards-HASH: train/ and validation/ token arrays, tokenizer.json, and validation.jsonl, test.jsonl, unseen.jsonl, the
fixed evaluation suites. Nothing of validation, test or unseen domains reaches the tokenizer or the training arrays.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from needle import artifacts, config
from needle.corpus import mix
from needle.data.packing import pack, padding_frac
from needle.data.settings import DataSettings
from needle.data.shards import MAX_VOCABULARY, Shard, ShardWriter
from needle.errors import ConfigError
from needle.generate import corpus_folder
from needle.progress import Progress
from needle.runs import Paths
from needle.schema import Example
from needle.teacher.recorded import RecordedTeacher
from needle.text.render import Span, render_calls, render_query, render_tools
from needle.text.tokenizer import TextCodec, train_tokenizer

PREPARE_VERSION = 1
EVALUATION_SPLITS = ("validation", "test", "unseen")
