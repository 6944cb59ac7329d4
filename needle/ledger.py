"""Looks into the ledger of bought answers, and carries it to other machines.

    python -m needle.ledger stats [--json]       # calls, tokens, cost, latency, acceptance by check
    python -m needle.ledger export FOLDER        # replies.parquet with a card
    python -m needle.ledger import FOLDER        # adds what this ledger does not have

`--ledger FILE` names another than conf/paths does. An exported folder replays every corpus that was made from it, with
neither key nor network: import it and run needle.generate again.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from needle import artifacts, config
from needle.errors import DataError, UserError
from needle.progress import Progress
from needle.schema import BadLine, canonical_json, strict_json
from needle.teacher.base import TeacherCall, TeacherReply
from needle.teacher.ledger import CALL_COLUMNS, REPLY_COLUMNS, Entry, Ledger, pack_log_probs, unpack_log_probs

EXPORT = "replies.parquet"
ROWS_AT_ONCE = 512
QUANTILES = (0.5, 0.9, 0.99)
TOKENS = ("prompt_tokens", "cached_tokens", "output_tokens", "thinking_tokens")


def stats(ledger: Ledger) -> dict[str, Any]:
    """Plain values: `teachers` (one a provider, model and role), `accounts`, `failures`, `acceptance`."""
    sums = ", ".join(f"sum({name})" for name in TOKENS)
    query = (
        f"SELECT provider, model, role, count(*), sum(attempts), {sums}, sum(cost_usd) FROM replies GROUP BY 1, 2, 3"
    )
    teachers = []
    for provider, model, role, answers, attempts, *totals, usd in ledger.rows(query):
        where = (provider, model, role)
        statuses = "SELECT status, count(*) FROM replies WHERE provider=? AND model=? AND role=? GROUP BY 1 ORDER BY 1"
        latencies = "SELECT latency_s FROM replies WHERE provider=? AND model=? AND role=?"
        seconds = np.array([s for (s,) in ledger.rows(latencies, where)])
        teachers.append(
            {"provider": provider, "model": model, "role": role, "answers": answers, "attempts": attempts}
            | {"statuses": dict(ledger.rows(statuses, where))}
            | dict(zip(TOKENS, totals, strict=True))
            | {"cost_usd": usd}
            | {f"latency_p{round(100 * q)}_s": float(np.quantile(seconds, q)) for q in QUANTILES}
            | {"latency_max_s": float(seconds.max())}
        )
    accounts = [
        {"account": name, "attempts": calls, "usd": usd, "answers": answers}
        for name, calls, usd, answers in ledger.rows(
            "SELECT name, calls, usd, (SELECT count(*) FROM replies WHERE account = name) FROM accounts ORDER BY name"
        )
    ]
    failures = [
        {"account": account, "reason": reason, "attempts": count, "maybe_usd": usd}
        for account, reason, count, usd in ledger.rows(
            "SELECT account, reason, count(*), sum(maybe_usd) FROM failures GROUP BY 1, 2 ORDER BY 1, 3 DESC"
        )
    ]
    columns = ("account", "check", "passed", "failed", "quarantined")
    rows = ledger.rows("SELECT account, name, passed, failed, quarantined FROM acceptance ORDER BY account, rowid")
    acceptance = [dict(zip(columns, row, strict=True)) for row in rows]
    return {"teachers": teachers, "accounts": accounts, "failures": failures, "acceptance": acceptance}


def show(figures: dict[str, Any], console: Console) -> None:
    """The figures as tables; teachers side by side, a figure a line."""
    if not figures["teachers"]:
        console.print("no answer has been bought yet")
    else:
        teachers = [_flat(row) for row in figures["teachers"]]
        lines = [
            {"": name, **{str(i): _cell(name, row[name]) for i, row in enumerate(teachers)}} for name in teachers[0]
        ]
        console.print(_table("Answers", lines, head=False))
    for title, key in (
        ("Spent: attempts started, dollars paid or perhaps charged", "accounts"),
        ("Attempts that failed", "failures"),
        ("Acceptance by check", "acceptance"),
    ):
        if figures[key]:
            console.print(_table(title, [_flat(row) for row in figures[key]], head=True))


def _table(title: str, rows: Sequence[dict[str, Any]], *, head: bool) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=head)
    for name, value in rows[0].items():
        is_text = not name or (head and isinstance(value, str))
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(name, value) for name, value in row.items()))
    return table


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: ", ".join(f"{v} {k}" for k, v in value.items()) if isinstance(value, dict) else value
        for name, value in row.items()
    }


def _cell(name: str, value: Any) -> str:
    if name.endswith("usd"):
        return f"${value:,.4f}"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def export(ledger: Ledger, folder: Path) -> int:
    """Writes every answer; how many.

    Raises:
        DataError: the folder is there already, or there is nothing to write.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    total = ledger.rows("SELECT count(*) FROM replies")[0][0]
    if folder.exists():
        raise DataError(f"{folder} is there already; name a new folder")
    if not total:
        raise DataError(f"{ledger.path} holds no answer: there is nothing to export")
    counts: dict[str, Any] = {"answers": total}
    with artifacts.publish(folder, kind="ledger", inputs={"ledger": str(ledger.path)}, counts=counts) as temporary:
        written = 0
        with Progress("exported") as progress:
            rows = map(_to_row, ledger.entries())
            with pq.ParquetWriter(temporary / EXPORT, _schema(), compression="zstd") as writer:
                while some := list(islice(rows, ROWS_AT_ONCE)):
                    writer.write_table(pa.Table.from_pylist(some, schema=_schema()))
                    written += len(some)
                    progress.update(written, total)
        (temporary / "README.md").write_text(_card(ledger), "utf-8")
    return total


def import_(ledger: Ledger, folder: Path) -> tuple[int, int, list[BadLine]]:
    """Adds answers from an export: how many were new, how many were there already, and the rows that were refused.

    A row whose key is not the content address of its question was changed on the way, and is refused.

    Raises:
        DataError: the folder holds no export.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(folder) / EXPORT
    try:
        file = pq.ParquetFile(path)
        if set(file.schema_arrow.names) != set(_schema().names):
            raise DataError(f"{path} is no exported ledger: its columns are {', '.join(file.schema_arrow.names)}")
        new = known = number = 0
        refused: list[BadLine] = []
        for batch in file.iter_batches(ROWS_AT_ONCE):
            entries, bad = _read_rows(str(path), number, batch.to_pylist())
            number += batch.num_rows
            refused += bad
            with ledger.transaction():
                stored = sum(ledger.store(entry) for entry in entries)
            new, known = new + stored, known + len(entries) - stored
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return new, known, refused


def _to_row(entry: Entry) -> dict[str, Any]:
    asked = vars(entry.call) | {"settings": canonical_json(entry.call.settings)}
    answered = {name: getattr(entry.reply, name) for name in REPLY_COLUMNS}
    if answered["calls"] is not None:
        answered["calls"] = json.dumps(answered["calls"], ensure_ascii=False)
    return {
        "key": entry.key,
        **asked,
        **answered,
        "log_probs": pack_log_probs(entry.reply.log_probs),
        "raw": json.dumps(entry.reply.raw, ensure_ascii=False),
        "account": entry.account,
        "bought_utc": entry.bought_utc,
    }


def _read_rows(path: str, before: int, rows: Sequence[dict[str, Any]]) -> tuple[list[Entry], list[BadLine]]:
    entries, refused = [], []
    for number, row in enumerate(rows, before + 1):
        try:
            entry = _from_row(row)
            if entry.call.key() != entry.key:
                raise ValueError("its key is not the content address of its question: it was changed")
        except (ValueError, TypeError) as error:
            refused.append(BadLine(path, number, str(error), str(row.get("key"))))
        else:
            entries.append(entry)
    return entries, refused


def _from_row(row: dict[str, Any]) -> Entry:
    asked = {name: row[name] for name in CALL_COLUMNS} | {"settings": strict_json(row["settings"])}
    answered = {name: row[name] for name in REPLY_COLUMNS}
    if answered["calls"] is not None:
        answered["calls"] = tuple(strict_json(answered["calls"]))
    whole = {"log_probs": unpack_log_probs(row["log_probs"]), "raw": strict_json(row["raw"])}
    reply = TeacherReply(**answered, **whole)
    return Entry(row["key"], TeacherCall(**asked), reply, row["account"], row["bought_utc"])


def _schema() -> Any:
    import pyarrow as pa

    kinds: dict[type, Any] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bytes: pa.binary()}
    columns: dict[str, type] = {"key": str} | dict.fromkeys(CALL_COLUMNS, str) | {"sample": int}
    defaults = asdict(TeacherReply(""))
    for name in REPLY_COLUMNS:
        columns[name] = str if name == "calls" else type(defaults[name])
    columns |= {"log_probs": bytes, "raw": str, "account": str, "bought_utc": str}
    return pa.schema([(name, kinds[kind]) for name, kind in columns.items()])


def _card(ledger: Ledger) -> str:
    figures = stats(ledger)
    first, last = ledger.rows("SELECT min(bought_utc), max(bought_utc) FROM replies")[0]
    lines = [
        "# Bought answers",
        "",
        f"Answers of hosted or local teachers with the questions they answer, bought between {first} and {last}. "
        f"`{EXPORT}` holds one answer a row; `key` is the SHA-256 of the question, which `python -m needle.ledger "
        "import` checks. What an answer may be used for is the provider's terms to say.",
        "",
        "| provider | model | role | answers | prompt tokens | output tokens | thinking tokens | cost |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in figures["teachers"]:
        tokens = " | ".join(f"{row[name]:,}" for name in ("prompt_tokens", "output_tokens", "thinking_tokens"))
        who = f"| {row['provider']} | {row['model']} | {row['role']} | {row['answers']:,} | "
        lines.append(f"{who}{tokens} | ${row['cost_usd']:,.4f} |")
    return "\n".join(lines) + "\n"


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    default = OmegaConf.load(config.CONF / "paths" / "default.yaml").ledger
    parser = argparse.ArgumentParser(prog="needle.ledger", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ledger", type=Path, default=Path(default), help=f"the ledger's file (default: {default})")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("stats", help="what was asked, answered, paid and accepted").add_argument(
        "--json", action="store_true", help="as JSON"
    )
    for name, text in (("export", "write every answer into FOLDER"), ("import", "add the answers of FOLDER")):
        commands.add_parser(name, help=text).add_argument("folder", type=Path, metavar="FOLDER")
    return parser.parse_args(arguments)


def _quarantine(ledger: Ledger, refused: Sequence[BadLine]) -> Iterator[str]:
    if refused:
        path = ledger.path.with_name(f"{ledger.path.name}-quarantine.jsonl")
        with path.open("a", encoding="utf-8") as stream:
            stream.writelines(bad.to_json() for bad in refused)
        yield f"{len(refused)} rows were refused, see {path}; the first: {refused[0].reason}"


def main(arguments: Sequence[str]) -> int:
    options = _arguments(arguments)
    if options.command != "import" and not options.ledger.is_file():
        raise DataError(f"{options.ledger} is not there: nothing has been bought yet, or --ledger names another file")
    ledger = Ledger(options.ledger)
    if options.command == "stats":
        figures = stats(ledger)
        if options.json:
            print(json.dumps(figures, indent=2, ensure_ascii=False))
        else:
            show(figures, Console())
        return 0
    if options.command == "export":
        print(f"{export(ledger, options.folder):,} answers: {options.folder}")
        return 0
    new, known, refused = import_(ledger, options.folder)
    print(f"{new:,} answers added, {known:,} were there already")
    problems = list(_quarantine(ledger, refused))
    print("\n".join(problems), end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"needle.ledger: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("needle.ledger: interrupted", file=sys.stderr)
        sys.exit(config.INTERRUPTED)
