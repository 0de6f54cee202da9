"""How long `import grape` takes, beside an interpreter that imports nothing: median of paired runs.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 15


def seconds(code: str) -> float:
    """Wall time of one fresh interpreter that runs ``code``."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Interleave the runs, so that both see the same machine."""
    cases = {"nothing": "pass", "import grape": "import grape", "grape.score": "import grape; grape.score"}
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(RUNS):
        for name, code in cases.items():
            taken[name].append(seconds(code))
    bare = statistics.median(taken["nothing"])
    for name, times in taken.items():
        middle = statistics.median(times)
        print(f"{name:13} {middle:.3f} s  ({middle - bare:+.3f} s, {middle / bare:.1f} x bare Python)")


if __name__ == "__main__":
    main()
