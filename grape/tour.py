"""`grape quickstart`: a policy of 0.3 million parameters learns from its rubrics, and the log is asked how."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from grape.config import RunConfig, load_run
from grape.resources import packaged

if TYPE_CHECKING:
    from grape.step import StepReport
    from grape.training import Trained

LOG = "quickstart.duckdb"
LAST = "(select max(run) from runs where kind = 'train')"
QUESTIONS = {
    "Does it learn?": f"""\
select (step - 1) // 10 * 10 + 1 as from_step, round(avg(mean_weighted), 3) as score,
       round(avg(mean_tokens), 1) as tokens, sum(dead_groups)::int as dead_groups
from training_curve where run = {LAST}
group by 1 order by 1""",
    "Which item moved the policy most?": f"""\
select item, round(sum(share), 3) as share, round(avg(mean_credit), 3) as mean_credit
from moved_most where run = {LAST}
group by item order by share desc""",
    "How sure is the judge of its scores?": f"""\
select item, count(*) as verdicts, round(avg(score), 3) as score, round(avg(confidence), 3) as confidence
from verdicts where run = {LAST} and kind = 'judge'
group by item order by confidence desc""",
    "Which critiques became rare?": f"""\
select reasoning, count(*) filter (step <= 10) as first_steps, count(*) filter (step > 50) as last_steps
from verdicts where run = {LAST} and kind = 'judge' and score = 0
group by reasoning order by first_steps desc""",
}
CRITIQUES = f"""\
select question, response, item, score, round(confidence, 3) as confidence, reasoning
from verdicts join responses using (run, step, question_id, response_id) join questions using (run, question_id)
where run = {LAST} and kind = 'judge' and score = 0
qualify row_number() over (partition by reasoning order by step, response_id, item) = 1
order by step, response_id, item limit 3"""


async def quickstart(
    log: str | Path = LOG,
    *,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    report: Callable[[StepReport], None] | None = None,
) -> Trained:
    """Train the packaged policy on the packaged questions; ``checkpoint`` is a folder to save what it became."""
    from grape.training import train

    return await train(settings(log, seed=seed, checkpoint=checkpoint), report=report)


def settings(log: str | Path = LOG, *, seed: int = 0, checkpoint: str | Path | None = None) -> RunConfig:
    """The packaged run, with its files where they are."""
    folder = packaged("quickstart")
    places: dict[str, str | Path] = {
        "policy.model": folder / "policy",
        "questions.path": folder / "questions.jsonl",
        "rubrics": folder / "rubrics",
        "judges.reader": folder / "reader.yaml",
        "checkers": folder / "checkers.py",
        "evaluate.questions.path": folder / "heldout.jsonl",
        "log": log,
    }
    if checkpoint is not None:
        places["checkpoint.dir"] = checkpoint
    quoted = [f"{field}={json.dumps(str(place))}" for field, place in places.items()]
    return load_run(folder / "run.yaml", [f"seed={seed}", *quoted])
