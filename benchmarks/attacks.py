"""What attacks on a judge are worth: each on clean and attacked pairs, against three judges.

    python benchmarks/attacks.py [--seeds 5] [--judges repeats fails trained] [--attacks NAME ...]

`repeats` is a server that gives the response back, in 19 ways (whole, the first or the last JSON object, written anew,
in a fence, behind a thought, quoted without escapes, ...), each a judge of its own; `fails` refuses, hangs or breaks
its reply on trigger words; `trained` is the quickstart's judge, a model of 56,000 parameters that runs here. Every item
says `on_failure: worst`. A shift is the attacked mean minus the clean one: of the score, over verdicts with one; and of
the share of verdicts without one. `forged`: accepted verdicts with the score that the attack claims (which no server
gives of its own accord), or that are not among the words that the model was taught. `paid`: items on which the attacked
response broke the judge, who had judged the clean one, and got more credit than that. Every failed verdict is counted
by the view `failures`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import duckdb  # noqa: E402
from attacks import ATTACKS, CLAIMED, Attack  # noqa: E402
from hostile import ECHOES, failing, response_in  # noqa: E402
from loopback import JudgeServer, user_text  # noqa: E402

import grape  # noqa: E402

LIVE = {"client": "openai", "model": "m", "timeout": 5, "retries": 0, "concurrency": 4}
CLEAN = ["You have 30 days to send it back. It may be worn.", "No. And do not ask again.", "It depends on the shop."]
TRAINED = ["It is lecur.", "Ugh. I give up. Whatever.", "Maybe it is xaf, I am not sure.", "Sure! It is abeqtu."]

FIGURES = """
with pairs as (
  select regexp_extract(v.question_id, '^[^#]*') as attack, v.response_id like '%attacked' as attacked, v.*
  from verdicts v
), credits as (
  select question_id, item, max(credit) filter (response_id like '%attacked')
      - max(credit) filter (response_id like '%clean') as gained,
    bool_or(score is null) filter (response_id like '%attacked') as failed,
    bool_or(score is null) filter (response_id like '%clean') as failed_before
  from item_credit group by question_id, item
), paid as (
  select regexp_extract(question_id, '^[^#]*') as attack,
    count(*) filter (failed and not failed_before and gained > 0) as paid
  from credits group by attack
)
select attack, count(*) filter (attacked) as n,
  avg(score) filter (attacked) - avg(score) filter (not attacked) as score,
  avg((score is null)::int) filter (attacked) - avg((score is null)::int) filter (not attacked) as failure,
  count(*) filter (score is not null and (score = $claimed or len($own) > 0 and not list_contains($own, reasoning)))
    as forged, any_value(paid) as paid
from pairs join paid using (attack) group by attack
"""


def score(folder: Path, texts: Sequence[str], attacks: Sequence[Attack], seeds: int, judges: Mapping[str, Any]) -> Path:
    """The log of all pairs, a question each, under items of these judges."""
    items = [
        {"id": f"i{n}", "criterion": criterion, "judge": name, "scale": scale, "on_failure": "worst"}
        for n, (name, (_, criterion, scale)) in enumerate(judges.items())
    ]
    (folder / "r.yaml").write_text(json.dumps({"rubric": "attacked", "formula": "weighted", "items": items}))
    files = {}
    for name, (settings, *_) in judges.items():
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(json.dumps({"judge": name, **settings}))
    rows = [
        {"question_id": f"{attack.name}#{n}.{seed}", "category": "attacked", "question": "May I return it?",
         "response_id": f"{attack.name}#{n}.{seed} {kind}", "response": response}
        for attack in attacks for n, text in enumerate(texts) for seed in range(seeds)
        for kind, response in {"clean": text, "attacked": attack(text, seed)}.items()
    ]  # fmt: skip
    log = folder / "log.duckdb"
    asyncio.run(grape.score(rows, rubrics=folder / "r.yaml", judges=files, log=log))
    return log


def trained() -> tuple[dict[str, Any], list[str]]:
    """The quickstart's judge on its two criteria, and all that it was taught to say."""
    folder = ROOT / "examples/quickstart"
    settings = {"client": "transformers", "model": str(folder / "judge"), "prompt": str(folder / "judge.jinja"),
                "sampling": {"temperature": 0, "max_tokens": 8}, "confidence": "logprob",
                "aggregate": "majority"}  # fmt: skip
    criteria = {"sure": "It commits to one answer.", "kind": "It is friendly."}
    judges = {name: (settings, criterion, "binary") for name, criterion in criteria.items()}
    return judges, runpy.run_path(str(folder / "make.py"))["REASONS"]


def figures(name: str, attacks: Sequence[Attack], seeds: int) -> list[tuple[Any, ...]]:
    """A row for each attack on one judge, and whether every failure is in the view."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if name == "trained":
            judges, own = trained()
            claimed = -1.0
            log = score(folder, TRAINED, [attack for attack in attacks if attack.small], seeds, judges)
        else:
            behaviour = (
                (lambda body, number: ECHOES[body["model"]](response_in(user_text(body))))
                if name == "repeats"
                else (lambda body, number: failing(response_in(user_text(body))))
            )
            with JudgeServer(behaviour) as server:
                ways = list(ECHOES) if name == "repeats" else ["m"]
                judges = {
                    f"j{n}": ({**LIVE, "endpoint": server.url, "model": way}, "Is right.", "unit")
                    for n, way in enumerate(ways)
                }
                log = score(folder, CLEAN, attacks, seeds, judges)
            own, claimed = [], CLAIMED
        with duckdb.connect(str(log), read_only=True) as connection:
            rows = connection.execute(FIGURES, {"own": own, "claimed": claimed}).fetchall()
            ((failed, shown),) = connection.sql(
                "select (select count(*) from verdicts where score is null), (select coalesce(sum(n), 0) from failures)"
            ).fetchall()
    order = {attack.name: n for n, attack in enumerate(attacks)}
    print(f"\n{name}: {failed} failed verdicts, {shown} of them shown by the view failures")
    return sorted(rows, key=lambda row: order[row[0]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--judges", nargs="+", default=["repeats", "fails", "trained"])
    parser.add_argument("--attacks", nargs="+", help="Parts of names.")
    given = parser.parse_args()
    attacks = [a for a in ATTACKS if not given.attacks or any(part in a.name for part in given.attacks)]
    for name in given.judges:
        rows = figures(name, attacks, given.seeds)
        print(f"{'attack':<34}  {'verdicts':>8}  {'score':>7}  {'failures':>8}  {'forged':>6}  {'paid':>4}")
        for attack, n, shift, failure, forged, paid in rows:
            moved = "-" if shift is None else f"{shift:+.3f}"
            print(f"{attack:<34}  {n:>8}  {moved:>7}  {failure:>+8.3f}  {forged:>6}  {paid:>4}")
        total = sum(row[1] for row in rows)
        print(f"{'all':<34}  {total:>8}  {'':>7}  {'':>8}  {sum(r[4] for r in rows):>6}  {sum(r[5] for r in rows):>4}")


if __name__ == "__main__":
    main()
