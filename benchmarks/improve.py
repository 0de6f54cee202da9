"""Does improving an earlier response beat answering afresh, and does training on such responses help or harm?

    python benchmarks/improve.py [--steps 300] [--seeds 1] [--runs FOLDER] [--plot docs/improve.png]

Runs of examples/improve: without the improve route, with a quarter of each group improved, and that with one setting
changed, for a third of the steps. Every run is a log in FOLDER (a temporary one by default); what is there already is
not run again. With a quarter improved, matched pairs within a step tell whether improved beats fresh (the view
`improve_effect`). All runs of a seed ask the same questions in the same order. A run of 300 steps takes three minutes
on a quiet core.
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
from statistics import fmean, stdev

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as the command does
os.environ.setdefault("OMP_NUM_THREADS", "1")

from grape.config import load_run
from grape.log.query import sql
from grape.training import train

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = Path("examples/improve")
RUNS = {  # what is changed of run.yaml
    "fresh": ["improve.share=0"],
    "improved": [],
    "no baseline": ["improve.baseline=false"],
    "no negative": ["improve.negative=false"],
    "rollout cap": ["loss.rollout_cap=2"],
}
LONG = {"fresh": "share 0", "improved": "share 0.25"}  # in the plot
FIGURES = ("mean_improved", "mean_fresh", "gain", "low", "high", "own_more", "own_low", "own_high", "over_parent")
EFFECT = f"select control, n, {', '.join(f'round({name}, 3) as {name}' for name in FIGURES)}"
# The same gain, of those that saw their own assessment, by fifth of the run.
FIFTHS = """
with scored as (
  select *, (step - 1) * 5 // {steps} + 1 as fifth
  from responses join rewards using (run, step, question_id, response_id) where run not like '%.heldout'
), pairs as (
  select fifth, avg(weighted) filter (route = 'fresh') as fresh, avg(weighted) filter (control = 'own') as own
  from scored group by fifth, step, question_id having count(*) filter (control = 'own') > 0
)
select fifth, round(avg(fresh), 3), round(avg(own - fresh), 3), round(1.96 * stddev(own - fresh) / sqrt(count(*)), 3)
from pairs group by fifth order by fifth
"""
# Nothing scores the mark after the word: a policy that collapses settles on one of the three.
MARKS = """
select entropy(regexp_extract(response, '[.!]?$')) * ln(2) from responses
where run like '%.heldout' and step = {step}
"""

HEADER = """
run          seed  steps  held-out: before  after  mean  entropy: first  last  marks  KL to start  gap  after - fresh"""


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
                steps = asked.steps if name in LONG else asked.steps // 3
                run(name, seed, steps, place(folder, name, seed))
        report(folder, asked.seeds, asked.steps)
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


def report(folder: Path, seeds: int, steps: int) -> None:
    """Pairs within a step, and a line for each run."""
    for seed in range(seeds):
        found = sql(f"{EFFECT} from improve_effect", place(folder, "improved", seed))
        print(f"\nImproved against fresh responses of the same question and step, seed {seed}: from improve_effect")
        print("  ".join(found.columns))
        for row in found.rows:
            print("  ".join("-" if cell is None else str(cell) for cell in row))
        for fifth, fresh, gain, width in sql(FIFTHS.format(steps=steps), place(folder, "improved", seed)).rows:
            print(f"own, fifth {fifth} of the steps: fresh {fresh}, gain {gain} +- {width}")
    print(HEADER)
    for until, names in ((steps // 3, RUNS), (steps, LONG)):
        for name in names:
            for seed in range(seeds):
                cells = "  ".join(f"{cell:.3f}" for cell in figures(place(folder, name, seed), until))
                against = "" if name == "fresh" else difference(folder, name, seed, until)
                print(f"{name:12} {seed:4}  {until:5}  {cells}  {against}".rstrip())


def figures(log: Path, until: int) -> list[float]:
    """A run up to a step: scores of held-out questions; entropy and KL, of the last 25 steps; the gap of contexts."""
    steps = [metrics for step, metrics in curves(log, heldout=False).items() if step <= until]
    scores = [one["weighted/mean"] for step, one in curves(log, heldout=True).items() if step <= until]
    last = [one for one in steps[-25:] if "entropy" in one]
    gaps = [one["off_policy/gap"] for one in steps if "off_policy/gap" in one]
    ((marks,),) = sql(MARKS.format(step=until), log).rows
    entropy = [steps[0]["entropy"], fmean(one["entropy"] for one in last), marks]
    kl = fmean(one["ref_kl"] for one in last)
    return [scores[0], scores[-1], fmean(scores), *entropy, kl, *([fmean(gaps)] if gaps else [])]


def difference(folder: Path, name: str, seed: int, step: int) -> str:
    """What the held-out questions score at a step more than without the improve route, question by question."""
    query = f"select question_id, weighted from rewards where run like '%.heldout' and step = {step}"
    ours, theirs = (dict(sql(query, place(folder, one, seed)).rows) for one in (name, "fresh"))
    more = [ours[question] - theirs[question] for question in theirs]
    return f"{fmean(more):+.3f} +- {1.96 * stdev(more) / len(more) ** 0.5:.3f}"


def draw(folder: Path, seeds: int, path: Path) -> None:
    """Held-out score, entropy and KL with and without the improve route, step by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), constrained_layout=True)
    for color, (name, label) in zip(("tab:gray", "tab:purple"), LONG.items(), strict=True):
        for seed in range(seeds):
            log = place(folder, name, seed)
            told = label if seed == 0 else None
            evaluated = curves(log, heldout=True)
            axes[0].plot(list(evaluated), [one["weighted/mean"] for one in evaluated.values()], color=color, label=told)
            steps = {step: one for step, one in curves(log, heldout=False).items() if "entropy" in one}
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
