"""Whether the example of a constitution holds, seed by seed: held-out violations and helpfulness after each phase.

    python benchmarks/constitution.py [FIELD=VALUE ...] [--reward preferences] [--seeds 0 1 2 3 4]

The policy and the judge of examples/constitution are made first where they are not there. Every seed is a run of its
own in a folder of its own; the figures are what SQL says of its log. Exit status 1 where a seed's violations do not
fall with each phase, or its helpfulness ends lower than it began, by more than its standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as the command does
os.environ.setdefault("OMP_NUM_THREADS", "1")

from grape.constitution import Constituted, constitution
from grape.log.query import sql

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/constitution"
PHASES = """
select step as phase, avg(score) filter (item = 'violates') as violates, avg(score) filter (item = 'helps') as helps,
  stddev_samp(score) filter (item = 'helps') / sqrt(count(*) filter (item = 'helps')) as error
from verdicts where run = '{run}.heldout' group by step order by step
"""


def main() -> int:
    """Run the seeds and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--reward", choices=["preferences", "judge", "principles"], default="preferences")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    options = parser.parse_args()
    os.environ["GRAPE_HOME"] = str(EXAMPLE)
    os.chdir(EXAMPLE.parent.parent)
    if not (EXAMPLE / "judge").is_dir():
        subprocess.run([sys.executable, str(EXAMPLE / "make.py")], check=True, stdout=sys.stderr)
    print(
        "seed  violates before, supervised, feedback  helps before, supervised, feedback  revised  pairs right  seconds"
    )
    good = 0
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as name:
            start = perf_counter()
            done, phases = run(Path(name), seed, options.reward, options.overrides)
            seconds = perf_counter() - start
        violates, helps = [row["violates"] for row in phases], [row["helps"] for row in phases]
        error = (phases[0]["error"] ** 2 + phases[-1]["error"] ** 2) ** 0.5
        good += violates[0] > violates[1] > violates[2] and helps[2] > helps[0] - error
        right = f"{done.model.heldout[max(done.model.heldout)]['accuracy']:.1%}" if done.model else "-"
        told = "   ".join("  ".join(f"{value:.3f}" for value in values) for values in (violates, helps))
        print(f"{seed:4}  {told}   {done.revised}/{done.chains}  {right}  {seconds:7.1f}", flush=True)
    print(f"{good} of {len(options.seeds)} seeds: violations fall with each phase, and helpfulness does not")
    return 0 if good == len(options.seeds) else 1


def run(folder: Path, seed: int, reward: str, overrides: list[str]) -> tuple[Constituted, list[dict[str, float]]]:
    """A whole run, and what the log says of its held-out questions by phase."""
    if reward != "preferences":
        overrides = [f"feedback={{reward: {reward}}}", *overrides]
    places = [f"checkpoint.dir={folder / 'checkpoints'}", f"log={folder / 'log.duckdb'}", f"seed={seed}"]
    done = asyncio.run(constitution(EXAMPLE / "run.yaml", overrides=[*places, *overrides]))
    found = sql(PHASES.format(run=done.run), folder / "log.duckdb")
    return done, [dict(zip(found.columns, row, strict=True)) for row in found.rows]


if __name__ == "__main__":
    sys.exit(main())
