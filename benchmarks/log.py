"""What the critique log sustains: verdict rows per second, a group-by over many rows, and kills at random moments.

    python benchmarks/log.py [throughput] [groupby] [kills] [--seconds 10] [--rows 1000000] [--kills 20] [--seed 0]

Every figure is measured on this machine while it runs; nothing is asserted but that no row is lost or stored twice.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grape.log import Log, writer
from grape.log.database import read

BATCH = 64
ITEMS = 8
POLL = 0.1  # seconds between the polling reader's queries
WORDS = [f"{a}{b}" for a in ("clear", "wrong", "step", "answer", "unit", "so", "the", "sum") for b in range(400)]


def verdicts(count: int, start: int, rng: random.Random) -> list[dict[str, Any]]:
    """Rows such as a run writes, about 300 characters of reasoning each, every text different."""
    now = datetime.now(UTC)
    rows = []
    for number in range(start, start + count):
        question, response, item = number // (8 * ITEMS), number // ITEMS, number % ITEMS
        rows.append({
            "run": "benchmark", "step": question // 32, "question_id": f"q{question}", "response_id": f"r{response}",
            "category": "math", "rubric": "math", "rubric_version": "1", "rubric_hash": "0123456789abcdef",
            "item": f"item-{item}", "kind": "judge", "criterion": "Every step follows from the one before.",
            "weight": 1 / ITEMS, "polarity": "desirable", "gate": None, "gate_reward": None, "on_failure": "impute",
            "applicable": True, "outcome": "ok", "score": rng.random(), "raw": "0.5", "confidence": rng.random(),
            "mean_confidence": 0.7, "imputed": False, "imputed_score": None,
            "reasoning": " ".join(rng.choices(WORDS, k=44))[:300], "critique": None, "judge": "default",
            "judge_hash": "fedcba9876543210", "calls": f'["{number:016x}"]', "attempts": 1, "latency": rng.random(),
            "input_tokens": rng.randrange(3000), "output_tokens": rng.randrange(300), "detail": None, "created": now,
        })  # fmt: skip
    return rows


def throughput(path: Path, seconds: float, rate: float, rng: random.Random) -> None:
    """Append batches of 64 at a rate (0: as fast as `append` takes them) while another process polls."""
    pool = [verdicts(BATCH, BATCH * number, rng) for number in range(400)]
    with Log(path) as log:
        log.append(verdicts=pool[0])
    poller = subprocess.Popen([sys.executable, __file__, "--poll", str(path)], stdout=subprocess.PIPE, text=True)
    assert poller.stdout is not None
    poller.stdout.readline()
    count, slowest, cpu, begun = 0, 0.0, time.process_time(), time.perf_counter()
    with Log(path) as log:
        while time.perf_counter() - begun < seconds:
            before = time.perf_counter()
            log.append(verdicts=pool[count // BATCH % len(pool)])
            slowest = max(slowest, time.perf_counter() - before)
            count += BATCH
            if rate:
                time.sleep(max(0.0, begun + count / rate - time.perf_counter()))
        appended = time.perf_counter() - begun
    stored, cpu = time.perf_counter() - begun, time.process_time() - cpu
    poller.send_signal(signal.SIGTERM)
    polls = poller.communicate()[0].strip()
    ((total,),) = read(path, "SELECT count(*) FROM verdicts")
    assert total == count + BATCH, f"{total} rows stored, {count + BATCH} appended"
    asked = f"asked for {rate:,.0f} rows/s" if rate else "as fast as append takes them"
    print(f"throughput, {asked}: {count:,} rows in batches of {BATCH}, appended in {appended:.1f} s, all stored in "
          f"{stored:.1f} s: {count / stored:,.0f} rows/s")  # fmt: skip
    print(f"  writer: {1e6 * cpu / count:.1f} us of CPU per row; slowest append {1e3 * slowest:.0f} ms; "
          f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")  # fmt: skip
    print(f"  reader: {polls}; exit status {poller.returncode}")
    print(f"  file: {path.stat().st_size / total:.0f} bytes per row")


def poll(path: Path) -> None:
    """The second process: ask ten times a second until told to stop, and report what it saw."""
    done: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: done.append(1))
    print("ready", flush=True)
    count, last, slowest = 0, 0, 0.0
    while not done:
        begun = time.perf_counter()
        ((seen,),) = read(path, "SELECT count(*) FROM verdicts")
        assert seen >= last, "rows have vanished"
        took = time.perf_counter() - begun
        count, last, slowest = count + 1, seen, max(slowest, took)
        time.sleep(max(0.0, POLL - took))
    print(f"{count} queries, no error, the slowest waited {1e3 * slowest:.0f} ms, the last saw {last:,} rows")


def groupby(path: Path, rows: int, rng: random.Random) -> None:
    """A group-by and two views over many rows, each by its own short connection."""
    with Log(path) as log:
        ((have,),) = log.query("SELECT count(*) FROM verdicts")
        while have < rows:
            log.append(verdicts=verdicts(2000, have, rng))
            have += 2000
    queries = {
        "group by item": "SELECT item, count(*), avg(score), stddev_samp(score) FROM verdicts GROUP BY ALL",
        "group by step, item": "SELECT step, item, avg(score), quantile_cont(score, 0.9) FROM verdicts GROUP BY ALL",
        "item_health": "FROM item_health",
        "failures": "FROM failures",
    }
    for name, query in queries.items():
        begun = time.perf_counter()
        found = read(path, query)
        print(f"{name}: {have:,} rows -> {len(found)}, {time.perf_counter() - begun:.2f} s")


def write(path: Path, start: int) -> None:
    """The process that is killed: numbered records over two tables, each acknowledged once `append` has returned."""
    writer.FLUSH_EVERY = 0.5  # so that kills fall into flushes, too
    with Log(path) as log:
        for number in range(start, 10**9):
            row = {"run": "kills", "question_id": str(number)}
            log.append(verdicts=[{**row, "item": str(i), "reasoning": "x" * 300} for i in range(8)], rewards=[row])
            print(number, flush=True)


def kills(path: Path, count: int, rng: random.Random) -> None:
    """Kill the writer at random moments, also while it stores and while it recovers; then compare with what it said."""
    said: set[int] = set()
    start = 0
    for _ in range(count):
        command = [sys.executable, __file__, "--write", str(path), str(start)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        time.sleep(rng.uniform(0.3, 2.5))
        child.kill()
        numbers = [int(line) for line in child.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
        said |= set(numbers)
        start = max(said, default=-1) + 1_000_000  # the next number may be stored though never acknowledged
    with Log(path) as log:
        stored = dict(log.query("SELECT question_id::INTEGER, count(*) FROM verdicts GROUP BY ALL"))
        rewarded = dict(log.query("SELECT question_id::INTEGER, count(*) FROM rewards GROUP BY ALL"))
    lost = said - stored.keys()
    doubled = [number for number, rows in stored.items() if rows != 8 or rewarded.get(number) != 1]
    print(f"kills: {count}; {len(said):,} records acknowledged, {len(stored):,} stored, {len(lost)} lost, "
          f"{len(doubled)} doubled or torn")  # fmt: skip
    if lost or doubled:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help="throughput, groupby, kills; all if none is named")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=60_000, help="rows per second of the paced run")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--poll", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.poll:
        return poll(options.poll)
    if options.write:
        return write(Path(options.write[0]), int(options.write[1]))
    rng, which = random.Random(options.seed), options.which or ["throughput", "groupby", "kills"]
    with tempfile.TemporaryDirectory() as folder:
        if "throughput" in which:
            throughput(Path(folder, "paced.duckdb"), options.seconds, options.rate, rng)
            throughput(Path(folder, "log.duckdb"), options.seconds, 0, rng)
        if "groupby" in which:
            groupby(Path(folder, "log.duckdb"), options.rows, rng)
        if "kills" in which:
            kills(Path(folder, "kills.duckdb"), options.kills, rng)
    return None


if __name__ == "__main__":
    main()
