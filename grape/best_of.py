"""`grape best-of`: several responses to each question, judged, and the best of them kept: rejection sampling."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from grape.collect import Collector
from grape.config import RunConfig, load_run
from grape.errors import ConfigError
from grape.heldout import asked
from grape.log import Log
from grape.material import Material, identity, make_accelerator, read_material, run_row
from grape.output import MESSAGES, NUMBER, TEXT, check_target, write_rows
from grape.panel import Panel
from grape.policy import load_policy
from grape.ranks import Ranks
from grape.recipes import SftRun
from grape.records import Record
from grape.resources import digest
from grape.run import hold, new_name
from grape.sampler import Sampler
from grape.scoring import make_critics
from grape.selection import ROUNDING, best, best_of_kl, majority, pass_at, top
from grape.step import StepReport
from grape.training import Report
from grape.tuning import Tuned, tune

if TYPE_CHECKING:
    from grape.sandbox import Sandbox

logger = logging.getLogger("grape")

COLUMNS = {"question_id": TEXT, "category": TEXT, "messages": MESSAGES, "response_id": TEXT, "reward": NUMBER}
Keep = Literal["best", "top", "majority"]
By = Literal["weighted", "reward", "normalized"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """What was kept, as rows of `grape sft`, and what all responses are like.

    ``mean`` is of all rewards, ``kept`` of those that were kept. ``pass_at`` says for 1, 2, 4, ... responses how
    probable it is that one of them is solved. ``kl`` is the most that the best of so many are away from the policy, in
    nats, for ``keep`` best.
    """

    run: str
    rows: list[Record]
    questions: int
    mean: float
    kept: float
    pass_at: dict[int, float]
    kl: float | None


async def best_of(
    run: RunConfig | str | Path,
    *,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    keep: Keep = "best",
    number: int | None = None,
    by: By = "weighted",
    min_reward: float | None = None,
    solved: float = 1.0,
    resume: bool = False,
    sandbox: Sandbox | None = None,
    report: Report | None = None,
) -> Selected:
    """Ask every question of a `run.yaml` ``sampling.responses`` times, judge, and keep of the responses

    - best: the one with the greatest reward of each question;
    - top: the ``number`` with the greatest rewards of all;
    - majority: the one whose text most of its group have.

    An empty response is never kept. ``by`` is the reward: the column of the log's table `rewards`. ``out`` (.jsonl or
    .parquet) gets rows that `grape sft` reads. A response is ``solved`` from that sum of weight x score on. Questions
    are asked ``sampling.questions`` at a time, each time in the log at once: ``resume`` goes on with the last run of
    the same inputs.
    """
    config = run if isinstance(run, RunConfig) else load_run(run, overrides)
    if (number is None) == (keep == "top"):
        raise ConfigError("--number: is how many --keep top keeps, and goes with nothing else")
    if out is not None:
        check_target(out, config.log, replace=True)
    accelerator = make_accelerator(config)
    if Ranks(accelerator).count > 1:
        raise ConfigError("grape best-of samples in one process: start it without torchrun")
    material = read_material(config)
    async with AsyncExitStack() as stack:
        store = stack.enter_context(Log(config.log))
        name = _run(config, material, store, resume)
        stack.enter_context(hold(store, name))
        policy = load_policy(config.policy.model, dtype=config.policy.dtype, device=str(accelerator.device))
        sampler = Sampler(policy, config, accelerator, training=False)
        panel = await stack.enter_async_context(Panel(make_critics(material.judges, store, name), sandbox))
        panel.check(material.plans.values())
        await panel.reach()
        collector = Collector(sampler=sampler, config=config, panel=panel)
        stack.callback(collector.close)
        material = material.with_room(collector, config.questions)
        if not store.query("select 1 from runs where run = ?", [name]):
            store.append(
                runs=[run_row(name, "best-of", config, material)],
                questions=material.question_rows(name, list(material.plans)),
            )
        await _ask(config, name, store, collector, material, report)
        found = _select(config, name, store, material, keep, number, by, min_reward, solved)
    if out is not None:
        write_rows(out, found.rows, COLUMNS)
    return found


async def rejection_sampling(
    run: RunConfig, recipe: SftRun, rounds: int, *, resume: bool = False, report: Report | None = None, **options: Any
) -> list[tuple[Selected, Tuned]]:
    """Rounds of `best_of` (``options`` are its own) and SFT on what was kept, each with the policy of the last one.

    Round r leaves `round-r/kept.jsonl` and its checkpoints `round-r/policy` in the ``recipe``'s checkpoint.dir, and
    draws with a seed of its own. ``resume`` goes on wherever it was.
    """
    model, done = run.policy.model, list[tuple[Selected, Tuned]]()
    for number in range(1, rounds + 1):
        folder = Path(recipe.checkpoint.dir) / f"round-{number}"
        kept = folder / "kept.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        policy = {"policy": run.policy.model_copy(update={"model": model})}
        one = run.model_copy(update={**policy, "seed": run.seed + number - 1})
        selected = await best_of(one, out=kept, resume=resume, report=report, **options)
        taught = recipe.model_copy(
            update={
                "policy": recipe.policy.model_copy(update={"model": model, **({"lora": None} if number > 1 else {})}),
                "data": recipe.data.model_copy(update={"path": str(kept), "map": {}}),
                "checkpoint": recipe.checkpoint.model_copy(update={"dir": str(folder / "policy")}),
            }
        )
        tuned = tune(taught, resume=resume, report=report)
        model = str(tuned.folder)
        done.append((selected, tuned))
    return done


def _run(config: RunConfig, material: Material, store: Log, resume: bool) -> str:
    """The run's name: a new one, or that of the last run of the same inputs."""
    inputs = digest(json.dumps(identity(config, material), sort_keys=True))
    query = "select run from runs where kind = 'best-of' and inputs = ? order by started desc limit 1"
    known = store.query(query, [inputs]) if resume else []
    if resume and not known:
        logger.warning("nothing to resume: no run of these inputs in the log; a new run begins")
    return str(known[0][0]) if known else new_name()


async def _ask(
    config: RunConfig, name: str, store: Log, collector: Collector, material: Material, report: Report | None
) -> None:
    """Every question that the log has no answers to."""
    ids, few = list(material.plans), config.sampling.questions
    done = {step for (step,) in store.query("select step from steps where run = ?", [name])}
    steps = math.ceil(len(ids) / few)
    for step in range(1, steps + 1):
        if step in done:
            continue
        started = perf_counter()
        metrics = await asked(
            config, name, step, store, collector, material, responses=config.sampling.responses,
            only=ids[(step - 1) * few : step * few], draw=f"best-of/{step}",
        )  # fmt: skip
        if report:
            report(StepReport(step=step, steps=steps, metrics=metrics, seconds=perf_counter() - started))


def _select(
    config: RunConfig, name: str, store: Log, material: Material, keep: Keep, number: int | None, by: By,
    min_reward: float | None, solved: float,
) -> Selected:  # fmt: skip
    found = store.query(
        f"select r.question_id, r.response_id, s.response, if(r.unscorable is null, r.{by}, null), r.weighted "
        "from rewards r join responses s on r.run = s.run and r.step = s.step and r.response_id = s.response_id "
        "where r.run = ? order by r.step, s.rowid",
        [name],
    )
    groups = [question_id for question_id, *_ in found]
    rewards = [math.nan if reward is None or not text.strip() else reward for _, _, text, reward, _ in found]
    if keep == "best":
        kept = best(rewards, groups)
    elif keep == "top":
        kept = top(rewards, number or 0)
    else:
        known = [place for place, reward in enumerate(rewards) if not math.isnan(reward)]
        places = majority([found[place][2].strip() for place in known], [groups[place] for place in known])
        kept = [known[place] for place in places]
    if min_reward is not None:
        kept = [place for place in kept if rewards[place] >= min_reward]
    right = Counter(
        group for group, (*_, weighted) in zip(groups, found, strict=True) if (weighted or 0) >= solved - ROUNDING
    )
    sizes, count = Counter(groups), config.sampling.responses
    given = [reward for *_, reward, _ in found if reward is not None]
    return Selected(
        run=name,
        rows=[_row(material, found[place]) for place in kept],
        questions=len(sizes),
        mean=fmean(given) if given else math.nan,
        kept=fmean(rewards[place] for place in kept) if kept else math.nan,
        pass_at={
            k: fmean(pass_at(k, size, right[group]) for group, size in sizes.items())
            for k in (2**power for power in range(count.bit_length()))
            if k <= count
        },
        kl=best_of_kl(count) if keep == "best" else None,
    )


def _row(material: Material, found: tuple[str, str, str, float | None, float | None]) -> Record:
    """A response as a row of `grape sft`."""
    question_id, response_id, text, reward, _ = found
    question = material.plans[question_id].question
    asked_ = [{"role": "user", "content": question.text}] if isinstance(question.text, str) else list(question.text)
    return {
        "question_id": question_id,
        "category": question.category,
        "messages": [*asked_, {"role": "assistant", "content": text}],
        "response_id": response_id,
        "reward": reward,
    }
