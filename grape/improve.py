"""The improve route: which earlier response is shown to the policy again, with what of its assessment, how often."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

from grape.batch import Judged, Settled
from grape.config import ImproveConfig
from grape.hidden import Hidden, hidden, saw_hidden
from grape.item import Item
from grape.judge.prompt import Prompt, load_prompt, well_formed
from grape.log import Log
from grape.plan import Plan
from grape.rubric import Rubric
from grape.types import Message, Question

Control = Literal["own", "shuffled", "none"]
Pick = Literal["random", "best", "worst", "last"]
FIELDS = ("question", "response", "items")
DRAWN = ("fresh", "improve")  # routes whose responses are improved: those that the policy wrote

# Of each question, the responses of the last step before one in which the policy answered it.
LAST = """
WITH last AS (
  SELECT question_id, max(step) AS step FROM responses
  WHERE run = $run AND step < $before AND route IN $routes AND list_contains($questions::VARCHAR[], question_id)
  GROUP BY question_id
)
"""
RESPONSES = f"""{LAST}
SELECT r.question_id, r.step, r.response_id, r.response, w.weighted
FROM responses r JOIN last USING (question_id, step)
LEFT JOIN rewards w USING (run, step, question_id, response_id)
WHERE r.run = $run AND r.route IN $routes ORDER BY r.rowid
"""
VERDICTS = f"""{LAST}
SELECT v.question_id, v.response_id, v.item, v.criterion, v.weight,
  if(v.polarity = 'undesirable', 1 - v.score, v.score) AS merit, v.reasoning, v.critique, v.rubric_hash
FROM verdicts v JOIN last USING (question_id, step)
WHERE v.run = $run AND v.outcome = 'ok' AND v.weight > 0 ORDER BY v.rowid
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessed:
    """What is shown of one item's verdict; ``merit`` is its score after polarity, so 1 leaves nothing to gain."""

    id: str
    criterion: str
    weight: float
    merit: float
    reasoning: str | None = None
    critique: str | None = None

    def shown(self, item: Item, secret: Hidden) -> Assessed:
        """As the policy may see it, and as the log would hold it."""
        said = None if saw_hidden(item) else self.reasoning
        critique = None if saw_hidden(item) else self.critique
        return replace(
            self, criterion=well_formed(self.criterion), reasoning=said and well_formed(said),
            critique=critique and well_formed(critique),
        ).without(secret)  # fmt: skip

    def without(self, secret: Hidden) -> Assessed:
        """With no sentence that quotes what is hidden."""
        return replace(
            self,
            criterion=secret.without(self.criterion),
            reasoning=self.reasoning and secret.without(self.reasoning),
            critique=self.critique and secret.without(self.critique),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Previous:
    """An earlier response that may be improved, with as much of its assessment as the policy may see.

    Only items that share theirs (`Item.shares_in_improve`) and have a score are in it. An item that saw the reference
    or the tests and shares all the same shows its score without a word; from the others' words every sentence that
    quotes something ``hidden`` is gone already.
    """

    response_id: str
    question_id: str
    category: str
    step: int
    text: str
    weighted: float | None
    items: tuple[Assessed, ...]
    hidden: Hidden


def previous_of(judged: Judged, settled: Settled, step: int, *, also: Collection[str] = ()) -> Previous:
    """A response of this step, to be improved within it; ``also`` names further hidden fields (`hidden`)."""
    secret = hidden(judged.plan, also)
    items = [
        Assessed(
            id=item.id,
            criterion=item.criterion,
            weight=judged.plan.weight[item.id],
            merit=1 - verdict.score if item.undesirable else verdict.score,
            reasoning=verdict.reasoning,
            critique=verdict.critique,
        ).shown(item, secret)
        for item in judged.plan.applicable
        if item.shares_in_improve and (verdict := judged.verdicts[item.id]).score is not None
    ]
    return Previous(
        response_id=judged.response.response_id,
        question_id=judged.response.question_id,
        category=judged.plan.question.category,
        step=step,
        text=well_formed(judged.response.text),
        weighted=settled.weighted,
        items=tuple(items),
        hidden=secret,
    )


def previous_groups(
    log: Log, run: str, plans: Mapping[str, Plan], *, before: int, also: Collection[str] = ()
) -> dict[str, tuple[Previous, ...]]:
    """By question, what the policy answered in the last step before ``before`` in which it was asked; in their order.

    ``plans`` (by question) say what may be shown; nothing is of verdicts by another version of the rubric. A question
    that was never asked has no entry.
    """
    values = {"run": run, "before": before, "questions": list(plans), "routes": DRAWN}
    secrets = {question: hidden(plan, also) for question, plan in plans.items()}
    shared = {(q, item.id): item for q, plan in plans.items() for item in plan.leaves if item.shares_in_improve}
    items: dict[tuple[str, str], list[Assessed]] = {}
    for question, response, name, criterion, weight, merit, reasoning, critique, rubric in log.query(VERDICTS, values):
        if (question, name) in shared and rubric == plans[question].rubric.hash:
            one = Assessed(
                id=name, criterion=criterion, weight=weight, merit=merit, reasoning=reasoning, critique=critique
            )  # fmt: skip
            found = items.setdefault((question, response), [])
            found.append(one.shown(shared[question, name], secrets[question]))
    groups: dict[str, tuple[Previous, ...]] = {}
    for question, step, response, text, weighted in log.query(RESPONSES, values):
        previous = Previous(
            response_id=response,
            question_id=question,
            category=plans[question].question.category,
            step=step,
            text=text,
            weighted=weighted,
            items=tuple(items.get((question, response), ())),
            hidden=secrets[question],
        )
        groups[question] = (*groups.get(question, ()), previous)
    return groups


def pick(previous: Sequence[Previous], how: Pick, rng: Random) -> Previous:
    """The one of a group that is improved. Best and worst go by ``weighted``, unscored ones last; ties to the first."""
    if how == "random":
        return rng.choice(previous)
    if how == "last":
        return previous[-1]
    sign = -1.0 if how == "best" else 1.0
    return min(previous, key=lambda one: (one.weighted is None, sign * (one.weighted or 0.0)))


def pick_other(previous: Previous, pool: Iterable[Previous], rng: Random) -> Previous | None:
    """Another question's response of the same category, for the control `shuffled`; None where there is none."""
    others = [one for one in pool if one.category == previous.category and one.question_id != previous.question_id]
    return rng.choice(others) if others else None


def routes(config: ImproveConfig, members: int, rng: Random, *, asked_before: bool = True) -> list[Control | None]:
    """How each member of a group is made: None is fresh, else improved, with this assessment; fresh ones come first.

    ``share`` of the members, halves rounded up, or each with ``probability``. None of a question that was not
    ``asked_before``; where what is improved is of the same step, at least one stays fresh.
    """
    number = int(config.share * members + 0.5)
    if config.probability:
        number = sum(rng.random() < config.probability for _ in range(members))
    if config.source == "step":
        number = min(number, max(members - 1, 0))
    if config.source == "log" and not asked_before:
        number = 0
    return [None] * (members - number) + _controls(config.controls, number, rng)


def _controls(share: float, number: int, rng: Random) -> list[Control | None]:
    """``share`` of so many see another question's assessment, the same share none: evenly spread from a random start,
    so that the shares hold in the mean also where a group has but one."""
    start = rng.random()
    points = [(place + start) / number for place in range(number)]
    return ["shuffled" if point < share else "none" if point < 2 * share else "own" for point in points]


def improve_prompt(rubric: Rubric) -> Prompt:
    """The rubric's improvement prompt. One that asks for a reference or anything else hidden is a `ConfigError`."""
    return load_prompt(f"improve/{rubric.improve}", FIELDS)


def improve_messages(
    question: Question,
    previous: Previous,
    prompt: Prompt,
    *,
    control: Control = "own",
    other: Previous | None = None,
    max_chars: int = 8000,
) -> tuple[Message, ...]:
    """The chat that asks for a better response: system and user.

    The items of the assessment stand in the order of what they cost, weight x (1 - merit), cut to ``max_chars``
    characters in all. ``control`` `shuffled` shows that of ``other``, `none` shows none.
    """
    assert (other is not None) == (control == "shuffled"), "another's assessment is shown where it is shuffled"
    items = {"own": previous.items, "none": ()}.get(control, other.items if other else ())
    items = tuple(item.without(previous.hidden) for item in items) if other else items
    return prompt.messages(
        question=well_formed(question.prompt), response=previous.text, items=_shown(items, max_chars)
    )  # fmt: skip


def _shown(items: Iterable[Assessed], room: int) -> list[dict[str, Any]]:
    """The items as the prompt takes them, the costliest first, as far as there is room for their texts."""
    shown: list[dict[str, Any]] = []
    for item in sorted(items, key=lambda item: -item.weight * (1 - item.merit)):
        if len(item.id) + len(item.criterion) > room:
            continue
        room -= len(item.id) + len(item.criterion)
        texts = {"critique": item.critique or "", "reasoning": item.reasoning or ""}
        for name, text in texts.items():
            texts[name] = text if len(text) <= room else f"{text[: room - 1]}…" if room else ""
            room -= len(texts[name])
        shown.append({"id": item.id, "criterion": item.criterion, "score": item.merit, **texts})
    return shown
