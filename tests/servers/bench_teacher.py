"""How fast answers are bought and looked up: the real Gemini client against the local server.

    python tests/servers/bench_teacher.py              # make bench-teacher; about three minutes
    python tests/servers/bench_teacher.py --calls 2000 --in-flight 50

Attainable is what the client itself reaches in as many processes, with as many calls in flight against the same server
and nothing else to do, and never more than in-flight / latency. What is bought passes the queue between the processes,
the budget and the ledger besides, on the same cores.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from running import running

from needle import config
from needle.artifacts import source_state, write_json_atomic
from needle.corpus import catalogue
from needle.progress import Progress
from needle.teacher.base import AskedTeacher, TeacherCall
from needle.teacher.ledger import Budget, Ledger
from needle.teacher.purchase import Purchases

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTION = "Call the tools that the request asks for."
MIB = 2**20


def teacher_node(url: str, in_flight: int, processes: int = 1) -> dict[str, Any]:
    """conf/teacher/gemini.yaml with its prices, pointed at the server."""
    node = OmegaConf.load(ROOT / "conf/teacher/gemini.yaml")
    node.prices = OmegaConf.load(ROOT / "conf/prices/google.yaml")
    node.base_url, node.traffic.concurrency, node.traffic.processes = url, in_flight, processes
    del node["defaults"]
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


def questions(teacher: AskedTeacher) -> Iterator[TeacherCall]:
    """The recorded requests, each with its domain's tools; from the second round on as further samples."""
    recorded = catalogue.load(ROOT / "data/teacher_corpus")
    for sample in count():
        for example in recorded.examples:
            tools = recorded.tools[example.domain]
            yield teacher.label_call(instruction=INSTRUCTION, query=example.query, tools=tools, sample=sample)


async def bare(teacher: AskedTeacher, calls: list[TeacherCall], in_flight: int) -> tuple[float, float]:
    """Calls a second of the client alone, and its milliseconds of a core for a call."""
    connection = teacher.connect()
    waiting = iter(calls)

    async def work() -> None:
        for call in waiting:
            await connection.ask(call)

    await connection.ask(calls[0])
    start, start_cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work() for _ in range(in_flight)))
    seconds, used_s = time.perf_counter() - start, time.process_time() - start_cpu_s
    await connection.close()
    return len(calls) / seconds, 1000 * used_s / len(calls)


def resident_mib(process: int | str) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def cpu_s(process: int | str) -> float:
    """Time that a process, all its threads together, has had on a core."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def buying_processes() -> list[int]:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(c) for c in children if b"needle.teacher.buyer" in Path(f"/proc/{c}/cmdline").read_bytes()]


def bought(node: dict[str, Any], calls: Iterator[TeacherCall], total: int, ledger: Path) -> dict[str, Any]:
    """Rate from the first answer on, and both processes' memory at each fifth."""
    teacher = config.build(node)
    memory: list[tuple[float, float]] = []
    terms = {"account": "bench", "budget": Budget(None, None), "buy": True}
    with Purchases(ledger, teacher=teacher, node=node, **terms) as purchases:
        start = time.perf_counter()
        for number, answer in enumerate(purchases.answers(islice(calls, total)), 1):
            assert answer.reply is not None, answer.reason
            if number == 1:
                start, buyers = time.perf_counter(), buying_processes()
                before = {"asking": cpu_s("self"), "buying": sum(map(cpu_s, buyers))}
            if number % (total // 5) == 0:
                memory.append((resident_mib("self"), max(map(resident_mib, buyers))))
        seconds = time.perf_counter() - start
        after = {"asking": cpu_s("self"), "buying": sum(map(cpu_s, buyers))}
    used_ms = {name: round(1000 * (after[name] - before[name]) / total, 2) for name in after}
    return {"calls_per_s": (total - 1) / seconds, "memory_mib": memory, "cpu_ms_per_call": used_ms}


def lookups_per_s(ledger: Path, node: dict[str, Any], total: int) -> float:
    keys = [call.key() for call in islice(questions(config.build(node)), total)]
    opened = Ledger(ledger)
    start = time.perf_counter()
    for key in keys:
        assert opened.get(key) is not None
    return len(keys) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--in-flight", type=int, default=200)
    parser.add_argument("--latency-ms", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--processes", type=int, default=1, help="that buy, and that the client alone runs in")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--bare", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["GEMINI_API_KEY"] = "local"
    if options.bare:
        node = teacher_node(options.bare, options.in_flight)
        calls = list(islice(questions(config.build(node)), options.calls))
        print(json.dumps(asyncio.run(bare(config.build(node), calls, options.in_flight))))
        return
    with (
        running("gemini_server.py", "--latency-ms", str(options.latency_ms)) as server,
        tempfile.TemporaryDirectory() as t,
    ):
        figures = measure(options, server.url, Path(t) / "ledger.sqlite", server)
    print(json.dumps(figures, indent=2))
    if options.output:
        write_json_atomic(options.output, figures | source_state())


def alone_calls_per_s(options: argparse.Namespace, calls: int, url: str) -> tuple[float, float]:
    """The clients' own rate: as many processes as buy, sharing the calls and those in flight."""
    share = [str(number // options.processes) for number in (calls, options.in_flight)]
    command = [sys.executable, __file__, "--bare", url, "--calls", share[0], "--in-flight", share[1]]
    running_ = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(options.processes)]
    told = [json.loads(process.communicate()[0]) for process in running_]
    return sum(rate for rate, _ in told), max(ms for _, ms in told)


def measure(options: argparse.Namespace, url: str, ledger: Path, server: Any) -> dict[str, Any]:
    """Rounds of both, one after the other, since a machine's own speed changes within minutes."""
    node = teacher_node(url, options.in_flight, options.processes)
    every = questions(config.build(node))
    share = options.calls // options.rounds
    alone_s = bought_s = 0.0
    memory, alone_ms, bought_ms, answered = [], [], [], 0
    with Progress("rounds") as progress:
        for number in range(1, options.rounds + 1):
            rate, cpu_ms = alone_calls_per_s(options, share, url)
            alone_s += share / rate
            alone_ms.append(cpu_ms)
            server.reset(jobs=True)
            figures = bought(node, every, share, ledger)
            bought_s += share / figures["calls_per_s"]
            bought_ms.append(figures["cpu_ms_per_call"])
            memory += figures["memory_mib"]
            stats = server.stats()
            answered += stats["answered"]
            progress.update(number, options.rounds, f"{rate:.0f} alone, {figures['calls_per_s']:.0f} bought a second")
    total = share * options.rounds
    alone, rate = total / alone_s, total / bought_s
    attainable = min(alone, options.in_flight / (options.latency_ms / 1000))
    return {
        "calls": total,
        "in_flight": options.in_flight,
        "processes": options.processes,
        "latency_ms": options.latency_ms,
        "client_alone_calls_per_s": round(alone, 1),
        "attainable_calls_per_s": round(attainable, 1),
        "bought_calls_per_s": round(rate, 1),
        "of_attainable_frac": round(rate / attainable, 3),
        "cpu_ms_per_call": {
            "client_alone": round(statistics.mean(alone_ms), 2),
            **{name: round(statistics.mean(ms[name] for ms in bought_ms), 2) for name in bought_ms[0]},
        },
        "server_answered": answered,
        "server_max_in_flight": stats["in_flight_max"],
        "memory_mib_of_asking_and_buying_process": [[round(a), round(b)] for a, b in memory],
        "lookups_per_s": round(lookups_per_s(ledger, node, total)),
    }


if __name__ == "__main__":
    main()
