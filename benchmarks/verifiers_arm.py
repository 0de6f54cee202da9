"""The arm `verifiers` of judge.py, for an interpreter that has the package: rewards by its `RubricJudge`, as JSON.

One call per criterion (`max_criteria=1`), all responses at once; it retries as it does by itself (not at all), and gets
a time limit, which it has not by itself. A judge that fails ends the rollout there: no reward.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from verifiers.v1.judges.rubric import RubricJudge, RubricJudgeConfig
from verifiers.v1.task import TaskData


async def main(url: str, timeout: float, texts: list[str], items: int) -> tuple[float, list[float | None]]:
    os.environ["BENCH_KEY"] = "none"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rubric.json"
        choices = [f"{n / 10:.1f}" for n in range(11)]
        criteria = [{"name": f"i{n}", "text": f"Criterion number {n} holds.", "choices": choices} for n in range(items)]
        path.write_text(json.dumps({"criteria": criteria}))
        config = RubricJudgeConfig(
            path=path, max_criteria=1, view="last_reply", base_url=url, api_key_var="BENCH_KEY", model="m",
            timeout={"read": timeout},
        )  # fmt: skip
        judge = RubricJudge(config)

        async def scored(text: str) -> float | None:
            nothing = lambda *args, **kw: None  # noqa: E731
            trace = SimpleNamespace(last_reply=text, record_judge_call=nothing, record_metric=nothing)
            try:
                return await judge.score(TaskData(prompt="Question?"), trace)
            except Exception:  # noqa: BLE001 - the rollout ends in error
                return None

        begun = time.perf_counter()
        rewards = list(await asyncio.gather(*(scored(text) for text in texts)))
        return time.perf_counter() - begun, rewards


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], float(sys.argv[2]), json.load(sys.stdin), int(sys.argv[3])))))
