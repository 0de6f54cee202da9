"""What a training run is made of: questions with their plans, rubrics, judges; and hashes that tell if it changed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs

from grape.checkers import load_checkers
from grape.collect import Collector, sft_text
from grape.config import QuestionsConfig, RunConfig
from grape.errors import ConfigError, known
from grape.item import flatten
from grape.judge.config import TRANSPORT, Judge
from grape.order import Order, keep_by_difficulty
from grape.plan import Plan
from grape.questions import Questions, plan_questions, read_questions, usable
from grape.recipes import Recipe
from grape.records import Record, question_rows
from grape.resources import digest, find, read_text
from grape.rows import Rows
from grape.rubric import Rubric, load_rubrics
from grape.scoring import load_judges


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """Questions, a plan for each, the rubrics by category and the judges by the names that rubrics use."""

    config: RunConfig
    questions: Questions
    plans: Mapping[str, Plan]
    rubrics: Mapping[str, Rubric]
    judges: Mapping[str, Judge]

    def order(self, scores: Mapping[str, Sequence[float]] | None = None) -> Order:
        """The order in which steps take the questions; ``scores`` of the untrained policy leave out the too easy and
        too hard ones."""
        config = self.config.questions
        ids = list(self.plans)
        difficulty: Mapping[str, float] | None = None
        if scores is not None and config.difficulty is not None:
            kept, difficulty = keep_by_difficulty(scores, config.difficulty)
            kept_ids = set(kept)
            ids = [name for name in ids if name in kept_ids]
        return Order.of(
            self.questions, ids, config, seed=self.config.seed, count=self.config.sampling.questions,
            steps=self.config.steps, difficulty=difficulty,
        )  # fmt: skip

    def question_rows(self, run: str, ids: Sequence[str]) -> list[Record]:
        """Rows of the log's table `questions`."""
        rows = self.questions.rows
        some = Rows(
            source=rows.source,
            questions={name: rows.questions[name] for name in ids},
            items={name: rows.items[name] for name in ids},
        )
        return question_rows(run, some)

    def with_room(self, collector: Collector, source: QuestionsConfig) -> Material:
        """The questions whose prompts leave room for a response, and for the answer that is given where it is a member
        of the group; what becomes of the others ``bad_rows`` says."""
        limit = self.config.sampling.max_tokens
        field = self.config.sft.field if self.config.sft and source is self.config.questions else None

        def check(question_id: str) -> None:
            plan, place = self.plans[question_id], self.questions.rows.places[question_id]
            if not collector.fits(ids := collector.fresh(plan, question_id).prompt_ids):
                raise ConfigError(
                    f"{place}: its prompt of {len(ids)} tokens and sampling.max_tokens {limit} exceed the policy's "
                    "context"
                )
            text = None if field is None else sft_text(plan, field)
            answer = () if text is None else collector.answer_ids(plan.question, text)
            if not collector.fits([*ids, *answer], 0):
                raise ConfigError(
                    f"{place}: its prompt of {len(ids)} tokens and its {field} of {len(answer)} exceed the policy's "
                    "context"
                )

        questions = usable(self.questions, source, check)
        plans = {name: self.plans[name] for name in questions.rows.questions}
        if field is not None and all(sft_text(plan, field) is None for plan in plans.values()):
            raise ConfigError(f"sft.field: {field!r}: no question of {questions.rows.source} has it")
        return replace(self, questions=questions, plans=plans)


def read_material(
    config: RunConfig, questions: QuestionsConfig | None = None, *, rubrics: str | None = None,
    judges: Mapping[str, str] | None = None, also: Collection[str] = (),
) -> Material:  # fmt: skip
    """Everything that the run's file names, read and checked; other questions, rubrics and judges where given.

    ``also`` are judges that are asked by other than rubrics.
    """
    for file in config.checkers:
        load_checkers(file)
    files = config.judges if judges is None else judges
    source = questions or config.questions
    by_category = load_rubrics(rubrics or config.rubrics, judges=files)
    asked, plans = plan_questions(read_questions(source), by_category, source)
    return Material(
        config=config,
        questions=asked,
        plans=plans,
        rubrics={plan.rubric.category: plan.rubric for plan in plans.values()},
        judges=load_judges(plans.values(), files, spare=questions is not None and judges is None, also=also),
    )


def identity(config: RunConfig, material: Material) -> dict[str, str]:
    """A hash of each part that decides the result, by its name in messages."""
    apart = dict.fromkeys(("checkpoint", "trackers", "log", "steps", "evaluate"), True)
    sections = config.model_dump(exclude={**apart, "policy": {"shard"}})  # how many hold a weight decides nothing
    if config.optimizer.schedule != "constant" or config.questions.order == "easy-to-hard":
        sections["steps"] = config.steps  # otherwise a run may be made longer
    parts = {name: digest(json.dumps(value, sort_keys=True)) for name, value in sections.items()}
    rows = material.question_rows("", list(material.plans))
    parts["questions' rows"] = digest(json.dumps(rows, sort_keys=True, default=str))
    prompts = {judge.prompt for judge in material.judges.values() if judge.client != "replay"}
    for rubric in material.rubrics.values():
        parts[f"rubric {rubric.rubric}"] = rubric.hash
        prompts |= {f"improve/{rubric.improve}"} | ({f"generate/{rubric.generate}"} if rubric.generate else set())
        prompts |= {f"critique/{leaf.critique}" for leaf in flatten(rubric.items) if leaf.critique}
    for name in prompts:
        parts[f"prompt {name}"] = digest(read_text(find("prompts", name)))
    for name, judge in material.judges.items():
        parts[f"judge {name}"] = digest(f"{judge.model_dump_json(exclude=TRANSPORT)} {judge.calibration or ''}")
    for file in config.checkers:
        parts[f"checkers {file}"] = digest(read_text(file))
    return parts


def run_row(name: str, kind: str, config: RunConfig, material: Material) -> Record:
    """The row of the log's table `runs`."""
    rubrics = {c: {"rubric": r.rubric, "version": r.version, "hash": r.hash} for c, r in material.rubrics.items()}
    return {
        "run": name,
        "kind": kind,
        "started": datetime.now(UTC),
        "version": version("grape-rl"),
        "inputs": digest(json.dumps(identity(config, material), sort_keys=True)),
        "config": json.dumps(config.model_dump()),
        "rubrics": json.dumps(rubrics),
        "judges": json.dumps(
            {name: {"model": j.model, "hash": j.hash, "identity": j.identity} for name, j in material.judges.items()}
        ),
        "seed": config.seed,
    }


def make_accelerator(config: RunConfig | Recipe) -> Any:
    """Device, precision, processes and trackers."""
    there = [str(tracker) for tracker in get_available_trackers()]
    for tracker in config.trackers:
        if tracker not in there:
            raise ConfigError(f"trackers: {tracker!r} is not installed; {known(there, tracker)}")
    AcceleratorState._reset_state()  # it is one for the process, and would refuse a second run of another precision
    return Accelerator(
        mixed_precision="bf16" if config.policy.dtype == "bfloat16" else "no",
        log_with=list(config.trackers) or None,
        project_dir=config.checkpoint.dir if config.checkpoint else ".",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],  # the others wait while judges judge
    )
