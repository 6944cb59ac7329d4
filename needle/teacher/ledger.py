"""Every bought answer, under the content address of its question: written before it is used, and never bought twice.

One SQLite file (write-ahead log, full synchronisation: an answer that was stored survives a power cut). Processes of
one machine may share it; SQLite's log does not work over network file systems.

A question passes through three states. `begin` claims it for an owner and reserves its cost in an account, in one
transaction with the check of the budget; `settle` stores the answer and turns the reservation into the price; `release`
gives up the claim. A claim whose owner's process is gone counts for nothing: an owner is alive as long as it holds the
lock of its file, which the kernel releases whatever ends the process.
"""

import base64
import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import secrets
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from needle.errors import DataError
from needle.schema import canonical_json
from needle.teacher.base import TeacherCall, TeacherReply, TokenLogProb

LEDGER_VERSION = 1
BUSY_TIMEOUT_S = 60.0
CALL_COLUMNS = ("provider", "model", "role", "instruction", "prompt", "tools", "settings", "sample")
SHARED_TEXTS = ("instruction", "tools")  # long, and the same in many calls: stored once each
TOKEN_COLUMNS = ("prompt_tokens", "cached_tokens", "output_tokens", "thinking_tokens")
REPLY_COLUMNS = (
    "status",
    "reason",
    "text",
    "calls",
    "model_version",
    *TOKEN_COLUMNS,
    "cost_usd",
    "latency_s",
    "attempts",
)

# Answers are kept in the order in which they came: rows under their random keys would touch a page each.
SCHEMA = """
CREATE TABLE IF NOT EXISTS texts (hash BLOB PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replies (
    id INTEGER PRIMARY KEY, key BLOB UNIQUE, provider TEXT, model TEXT, role TEXT, instruction BLOB, prompt TEXT,
    tools BLOB, settings TEXT, sample INTEGER, status TEXT, reason TEXT, text TEXT, calls TEXT, model_version TEXT,
    prompt_tokens INTEGER, cached_tokens INTEGER, output_tokens INTEGER, thinking_tokens INTEGER, cost_usd REAL,
    latency_s REAL, attempts INTEGER, account TEXT, bought_utc TEXT
);
CREATE TABLE IF NOT EXISTS payloads (id INTEGER PRIMARY KEY, log_probs BLOB, raw BLOB);
CREATE TABLE IF NOT EXISTS claims (
    key BLOB PRIMARY KEY, owner TEXT, account TEXT, reserved_usd REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS accounts (name TEXT PRIMARY KEY, calls INTEGER, usd REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (key BLOB, account TEXT, at_utc TEXT, reason TEXT, maybe_usd REAL);
CREATE TABLE IF NOT EXISTS acceptance (
    account TEXT, name TEXT, passed INTEGER, failed INTEGER, quarantined INTEGER, PRIMARY KEY (account, name)
);
"""


@dataclass(frozen=True)
class Budget:
    """Limits of an account, over all its processes and all its restarts; null: none."""

    calls: int | None
    usd: float | None


@dataclass(frozen=True)
class Spending:
    """Attempts started so far, and dollars paid or reserved."""

    calls: int
    usd: float


@dataclass(frozen=True)
class Entry:
    """One bought answer with its question. `account`: who paid, `bought_utc`: when."""

    key: str
    call: TeacherCall
    reply: TeacherReply
    account: str
    bought_utc: str


class Owner:
    """A process that buys. Its lock file says that it is alive; closing it, or dying, says that it is not."""

    def __init__(self, ledger: Path):
        folder = _owners_folder(ledger)
        folder.mkdir(parents=True, exist_ok=True)
        self.name = secrets.token_hex(8)
        self._path = folder / self.name
        self._stream = self._path.open("w")
        fcntl.flock(self._stream, fcntl.LOCK_EX)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._stream.close()

    @staticmethod
    def is_alive(ledger: Path, name: str) -> bool:
        try:
            with (_owners_folder(ledger) / name).open("r") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


class Ledger:
    """One connection to the file; used by one thread at a time.

    Raises:
        DataError: the file is no ledger, is of another version, or cannot be opened; at creation only.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=256
            )
            self._accounts: dict[str, Spending] | None = None
            self._texts: set[bytes] = set()
            self._new_texts: set[bytes] = set()
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                self._create()
        except (sqlite3.Error, OSError) as error:
            raise DataError(f"cannot open the ledger {self.path}: {error}") from error
        if version not in (0, LEDGER_VERSION):
            raise DataError(f"{self.path} is a ledger of version {version}; this code reads version {LEDGER_VERSION}")

    def _create(self) -> None:
        with self.transaction():
            for statement in SCHEMA.split(";"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={LEDGER_VERSION}")

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, against other processes too."""
        self._db.execute("BEGIN IMMEDIATE")
        # Accounts and shared texts are looked at once a transaction: a statement costs more than what it does.
        accounts: dict[str, Spending] = {}
        self._accounts, self._new_texts = accounts, set()
        try:
            yield
            rows = [(name, spent.calls, spent.usd) for name, spent in accounts.items()]
            self._db.executemany("INSERT OR REPLACE INTO accounts VALUES (?, ?, ?)", rows)
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        finally:
            self._accounts = None
        self._texts |= self._new_texts

    # Looking up

    def get(self, key: str) -> TeacherReply | None:
        """The stored answer without log-probabilities and raw response."""
        row = self._db.execute(_GET, (bytes.fromhex(key),)).fetchone()
        return None if row is None else _reply(row)

    def payload(self, key: str) -> tuple[tuple[TokenLogProb, ...] | None, Mapping[str, Any]]:
        """Log-probabilities and the provider's raw response of a stored answer.

        Raises:
            KeyError: there is no such answer.
        """
        query = "SELECT log_probs, raw FROM payloads WHERE id = (SELECT id FROM replies WHERE key=?)"
        row = self._db.execute(query, (bytes.fromhex(key),)).fetchone()
        if row is None:
            raise KeyError(key)
        return unpack_log_probs(row[0]), json.loads(zlib.decompress(row[1]))

    def entries(self) -> Iterator[Entry]:
        """Every answer, whole, in the order of the keys."""
        query = f"SELECT {', '.join(_ENTRY)} FROM replies r JOIN payloads p ON p.id = r.id ORDER BY r.key"
        texts = dict(self._db.execute("SELECT hash, text FROM texts"))
        asked, answered = 1 + len(CALL_COLUMNS), 1 + len(CALL_COLUMNS) + len(REPLY_COLUMNS)
        for row in self._db.execute(query):
            named = dict(zip(CALL_COLUMNS, row[1:asked], strict=True))
            named |= {column: texts[named[column]] for column in SHARED_TEXTS}
            named["settings"] = json.loads(named["settings"])
            account, bought_utc, log_probs, raw = row[answered:]
            whole = {"log_probs": unpack_log_probs(log_probs), "raw": json.loads(zlib.decompress(raw))}
            reply = _reply(row[asked:answered], **whole)
            yield Entry(row[0].hex(), TeacherCall(**named), reply, account, bought_utc)

    def sample(self, like: TeacherCall, most: int) -> list[TeacherReply]:
        """Answers of the same provider, model and role, whatever the question; in the order of the keys."""
        query = f"SELECT {', '.join(REPLY_COLUMNS)} FROM replies WHERE provider=? AND model=? AND role=? LIMIT ?"
        return [_reply(row) for row in self._db.execute(query, (like.provider, like.model, like.role, most))]

    def spending(self, account: str) -> Spending:
        if self._accounts is not None and account in self._accounts:
            return self._accounts[account]
        row = self._db.execute("SELECT calls, usd FROM accounts WHERE name=?", (account,)).fetchone()
        return Spending(*row) if row else Spending(0, 0.0)

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """A question in SQL, for statistics."""
        return self._db.execute(query, parameters).fetchall()

    # Buying: each of these runs inside `transaction()`

    def begin(self, key: str, *, owner: str, account: str, budget: Budget, most_usd: float) -> str:
        """Claims a question and reserves one attempt.

        Returns `go`, or why not: `known` (it is answered), `busy` (another living owner has it), `wait` (the budget in
        dollars is reserved by questions that may turn out cheaper), `budget_calls`, `budget_usd`.
        """
        blob = bytes.fromhex(key)
        answered, claimed_by = self._db.execute(_STATE, (blob, blob)).fetchone()
        if answered:
            return "known"
        if claimed_by is not None:
            if Owner.is_alive(self.path, claimed_by):
                return "busy"
            self._forget(blob)
        refusal = self._reserve(account, budget, most_usd)
        if refusal is None:
            self._db.execute("INSERT INTO claims VALUES (?, ?, ?, ?)", (blob, owner, account, most_usd))
        return refusal or "go"

    def again(
        self, key: str, *, account: str, budget: Budget, most_usd: float, billed: bool, reason: str
    ) -> str | None:
        """Reserves one more attempt of a claimed question after one that failed; what the failed one may have cost
        stays counted if `billed`. Returns None, or which budget forbids it, and then the claim has ended."""
        blob = bytes.fromhex(key)
        self._note_failure(blob, account, reason, most_usd if billed else 0.0)
        # What did not cost anything keeps its reservation for the next attempt.
        refusal = self._reserve(account, budget, most_usd if billed else 0.0)
        if refusal is not None:
            self._db.execute("DELETE FROM claims WHERE key=?", (blob,))
            self._add(account, calls=0, usd=0.0 if billed else -most_usd)
        return refusal

    def settle(self, key: str, call: TeacherCall, reply: TeacherReply, *, account: str, most_usd: float) -> None:
        """Stores the answer, replaces the reservation by its price, and ends the claim."""
        self.store(Entry(key, call, reply, account, _now()))
        self._add(account, calls=0, usd=reply.cost_usd - most_usd)
        self._db.execute("DELETE FROM claims WHERE key=?", (bytes.fromhex(key),))

    def release(self, key: str, *, account: str, most_usd: float, asked: bool, billed: bool, reason: str) -> None:
        """Ends the claim without an answer: never asked, or given up after a failed attempt."""
        blob = bytes.fromhex(key)
        self._db.execute("DELETE FROM claims WHERE key=?", (blob,))
        if not (asked and billed):
            self._add(account, calls=0 if asked else -1, usd=-most_usd)
        if asked:
            self._note_failure(blob, account, reason, most_usd if billed else 0.0)

    def store(self, entry: Entry) -> bool:
        """Adds an answer; False when the question has one already, which then stays."""
        blob, call, reply = bytes.fromhex(entry.key), entry.call, entry.reply
        shared = [self._share(getattr(call, name)) for name in SHARED_TEXTS]
        settings = canonical_json(call.settings)
        asked = (call.provider, call.model, call.role, shared[0], call.prompt, shared[1], settings, call.sample)
        calls = None if reply.calls is None else json.dumps(reply.calls, ensure_ascii=False)
        answered = [calls if name == "calls" else getattr(reply, name) for name in REPLY_COLUMNS]
        values = (blob, *asked, *answered, entry.account, entry.bought_utc)
        marks = ", ".join("?" * len(values))
        stored = self._db.execute(f"INSERT OR IGNORE INTO replies VALUES (NULL, {marks})", values)
        if stored.rowcount != 1:
            return False
        raw = zlib.compress(json.dumps(reply.raw, ensure_ascii=False).encode(), 1)
        payload = (stored.lastrowid, pack_log_probs(reply.log_probs), raw)
        self._db.execute("INSERT INTO payloads VALUES (?, ?, ?)", payload)
        return True

    def record_acceptance(self, account: str, counts: Mapping[str, tuple[int, int, int]]) -> None:
        """How many examples passed, failed and were set aside by each check, replacing what was known before."""
        with self.transaction():
            self._db.execute("DELETE FROM acceptance WHERE account=?", (account,))
            rows = [(account, name, *three) for name, three in counts.items()]
            self._db.executemany("INSERT INTO acceptance VALUES (?, ?, ?, ?, ?)", rows)

    def release_dead(self) -> int:
        """Ends every claim whose owner is gone; how many there were."""
        owners = [name for (name,) in self._db.execute("SELECT DISTINCT owner FROM claims")]
        dead = [name for name in owners if not Owner.is_alive(self.path, name)]
        claims = [k for name in dead for (k,) in self._db.execute("SELECT key FROM claims WHERE owner=?", (name,))]
        for key in claims:
            self._forget(key)
        return len(claims)

    def _forget(self, key: bytes) -> None:
        """Ends a dead owner's claim. Whether it was asked for is not known, so its reservation stays spent."""
        query = "SELECT account, reserved_usd FROM claims WHERE key=?"
        account, reserved_usd = self._db.execute(query, (key,)).fetchone()
        self._db.execute("DELETE FROM claims WHERE key=?", (key,))
        self._note_failure(key, account, "the buying process died; the provider may have charged", reserved_usd)

    def _reserve(self, account: str, budget: Budget, most_usd: float) -> str | None:
        spent = self.spending(account)
        if budget.calls is not None and spent.calls + 1 > budget.calls:
            return "budget_calls"
        if budget.usd is not None and spent.usd + most_usd > budget.usd:
            reserved = self.rows("SELECT total(reserved_usd) FROM claims WHERE account=?", (account,))[0][0]
            return "budget_usd" if spent.usd - reserved + most_usd > budget.usd else "wait"
        self._add(account, calls=1, usd=most_usd)
        return None

    def _add(self, account: str, *, calls: int, usd: float) -> None:
        assert self._accounts is not None, "outside of a transaction"
        spent = self.spending(account)
        self._accounts[account] = Spending(spent.calls + calls, spent.usd + usd)

    def _note_failure(self, key: bytes, account: str, reason: str, maybe_usd: float) -> None:
        self._db.execute("INSERT INTO failures VALUES (?, ?, ?, ?, ?)", (key, account, _now(), reason, maybe_usd))

    def _share(self, text: str) -> bytes:
        digest = _digest(text)
        if digest not in self._texts and digest not in self._new_texts:
            self._db.execute("INSERT OR IGNORE INTO texts VALUES (?, ?)", (digest, text))
            self._new_texts.add(digest)
        return digest


@functools.lru_cache(maxsize=1024)
def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _owners_folder(ledger: Path) -> Path:
    return ledger.with_name(f"{ledger.name}-owners")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _reply(row: Sequence[Any], **more: Any) -> TeacherReply:
    named = dict(zip(REPLY_COLUMNS, row, strict=True))
    if named["calls"] is not None:
        named["calls"] = tuple(json.loads(named["calls"]))
    return TeacherReply(**named, **more)


def pack_log_probs(log_probs: Sequence[TokenLogProb] | None) -> bytes | None:
    if log_probs is None:
        return None
    plain = [[_text(t.token), t.log_prob, [[_text(b), value] for b, value in t.top]] for t in log_probs]
    return zlib.compress(json.dumps(plain).encode(), 1)


def unpack_log_probs(packed: bytes | None) -> tuple[TokenLogProb, ...] | None:
    if packed is None:
        return None
    plain = json.loads(zlib.decompress(packed))
    return tuple(
        TokenLogProb(_bytes(token), log_prob, tuple((_bytes(text), value) for text, value in top))
        for token, log_prob, top in plain
    )


def _text(token: bytes) -> str:
    return base64.b64encode(token).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)


_STATE = "SELECT (SELECT 1 FROM replies WHERE key=?), (SELECT owner FROM claims WHERE key=?)"
_GET = f"SELECT {', '.join(REPLY_COLUMNS)} FROM replies WHERE key=?"
_STORED = (*CALL_COLUMNS, *REPLY_COLUMNS, "account", "bought_utc")
_ENTRY = ("r.key", *(f"r.{name}" for name in _STORED), "p.log_probs", "p.raw")
