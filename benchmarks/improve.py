"""Does improving an earlier response beat answering afresh, and does training on such responses help or harm?

    python benchmarks/improve.py [--steps 300] [--seeds 1] [--runs FOLDER] [--plot docs/improve.png]

Runs of examples/improve: without the improve route, with a quarter of each group improved, and that with one setting
changed. Every run is a log in FOLDER (a temporary one by default); what is there already is not run again. With a
quarter improved, matched pairs within a step tell whether improved beats fresh (the view `improve_effect`). All runs of
a seed ask the same questions in the same order. A run of 300 steps takes three minutes on a quiet core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as the command does
os.environ.setdefault("OMP_NUM_THREADS", "1")

from grape.config import load_run
from grape.log import sql
from grape.training import train

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = Path("examples/improve")
RUNS = {
    "fresh": ["improve.share=0"],
    "improved": [],
    "no baseline": ["improve.baseline=false"],
    "no negative": ["improve.negative=false"],
    "rollout cap": ["loss.rollout_cap=2"],
}
SHOWN = {"fresh": "share 0", "improved": "share 0.25"}  # in the plot
FIGURES = ("mean_improved", "mean_fresh", "gain", "low", "high", "own_more", "own_low", "own_high", "over_parent")
EFFECT = f"select control, n, {', '.join(f'round({name}, 3) as {name}' for name in FIGURES)}"
# Nothing scores the mark after the word: a policy that collapses settles on one of the three.
MARKS = """
select entropy(regexp_extract(response, '[.!]?$')) * ln(2) from responses
where run like '%.heldout' and step = (select max(step) from steps where run like '%.heldout')
"""


def main() -> int:
    """Run what is missing, print the figures, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (asked.runs or Path(scratch)).resolve()
        plot = asked.plot and asked.plot.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(ROOT)
        os.environ["GRAPE_HOME"] = str(EXAMPLE)  # its improvement prompt is found there
        if not (EXAMPLE / "policy/model.safetensors").exists():
            subprocess.run([sys.executable, EXAMPLE / "make.py", "policy"], check=True)
        for seed in range(asked.seeds):
            for name in RUNS:
                run(name, seed, asked.steps, place(folder, name, seed))
        report(folder, asked.seeds)
        if plot:
            draw(folder, asked.seeds, plot)
    return 0


def place(folder: Path, name: str, seed: int) -> Path:
    """Where the log of a run stands."""
    return folder / f"{name.replace(' ', '-')}-{seed}.duckdb"


def run(name: str, seed: int, steps: int, log: Path) -> None:
    """One run, unless its log is finished."""
    if log.exists():
        ((done,),) = sql("select count(*) from steps where run not like '%.heldout'", log).rows
        if done >= steps:
            return
        log.unlink()
    config = load_run(EXAMPLE / "run.yaml", [*RUNS[name], f"steps={steps}", f"seed={seed}", f"log={log}"])
    print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
    asyncio.run(train(config))


def curves(log: Path, *, heldout: bool) -> dict[int, dict[str, float]]:
    """The metrics of a run, or of its held-out questions, by step."""
    like = "like" if heldout else "not like"
    found = sql(f"select step, metrics::varchar from steps where run {like} '%.heldout' order by step", log)
    return {step: json.loads(metrics) for step, metrics in found.rows}


def report(folder: Path, seeds: int) -> None:
    """Pairs within a step, and a line for each run."""
    for seed in range(seeds):
        found = sql(f"{EFFECT} from improve_effect", place(folder, "improved", seed))
        print(f"\nImproved against fresh responses of the same question and step, seed {seed}: from improve_effect")
        print("  ".join(found.columns))
        for row in found.rows:
            print("  ".join("-" if cell is None else str(cell) for cell in row))
    print("\nrun          seed  held-out before  after  mean of all  entropy: first  last  of marks  KL to start  gap")
    for name in RUNS:
        for seed in range(seeds):
            log = place(folder, name, seed)
            steps, evaluated = curves(log, heldout=False), curves(log, heldout=True)
            scores = [metrics["weighted/mean"] for metrics in evaluated.values()]
            metrics = list(steps.values())
            last = metrics[-25:]
            ((marks,),) = sql(MARKS, log).rows
            gaps = [one["off_policy/gap"] for one in metrics if "off_policy/gap" in one]
            cells = [scores[0], scores[-1], fmean(scores), metrics[0]["entropy"], fmean(m["entropy"] for m in last),
                     marks, fmean(m["ref_kl"] for m in last), *([fmean(gaps)] if gaps else [])]  # fmt: skip
            print(f"{name:12} {seed:4}  {'  '.join(f'{cell:.3f}' for cell in cells)}")


def draw(folder: Path, seeds: int, path: Path) -> None:
    """Held-out score, entropy and KL with and without the improve route, step by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), constrained_layout=True)
    for color, (name, label) in zip(("tab:gray", "tab:purple"), SHOWN.items(), strict=True):
        for seed in range(seeds):
            log = place(folder, name, seed)
            told = label if seed == 0 else None
            evaluated = curves(log, heldout=True)
            axes[0].plot(list(evaluated), [one["weighted/mean"] for one in evaluated.values()], color=color, label=told)
            steps = curves(log, heldout=False)
            for axis, metric in zip(axes[1:], ("entropy", "ref_kl"), strict=True):
                axis.plot(list(steps), smooth([one[metric] for one in steps.values()]), color=color, label=told)
    titles = ("held-out score (sum of weight x score)", "entropy per token (nats)", "KL to the start per token (nats)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def smooth(values: list[float], width: int = 10) -> list[float]:
    """Means of the last so many values."""
    return [fmean(values[max(0, place - width + 1) : place + 1]) for place in range(len(values))]


if __name__ == "__main__":
    sys.exit(main())
