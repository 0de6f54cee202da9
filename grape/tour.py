"""`grape quickstart`: real responses of four models, scored and asked about in SQL."""

from __future__ import annotations

from pathlib import Path

from grape.panel import Progress
from grape.records import Record
from grape.resources import packaged
from grape.scoring import score

LOG = "quickstart.duckdb"
QUESTIONS = {
    "Which model answers best?": """\
select metadata->>'model' as model, count(*) as responses,
       round(avg(score), 3) as correct, round(1.96 * stddev(score) / sqrt(count(*)), 3) as plus_minus
from verdicts join responses using (run, step, response_id)
where item = 'correct' and run = (select max(run) from runs)
group by model order by correct desc""",
    "Why did a response get its score?": """\
select response_id, item, score, reasoning
from verdicts
where run = (select max(run) from runs) and item = 'correct' and score = 0
order by response_id limit 3""",
}


async def quickstart(log: str | Path = LOG, progress: Progress | None = None) -> list[Record]:
    """Score the packaged set (GSM8K test questions answered by four models) with the maths rubric, without judges."""
    data = packaged("quickstart") / "responses.jsonl"
    rubric = packaged("rubrics") / "math.yaml"
    return await score(data, rubrics=rubric, log=log, use_judges=False, progress=progress)
