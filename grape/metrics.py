"""What a step's groups say about the policy: the numbers that every step logs, by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

from grape.batch import Judged, Settled
from grape.checkers.refusal import is_refusal
from grape.checkers.style import repeated, stock_phrases
from grape.collect import Answered
from grape.types import Outcome

DUE = frozenset(Outcome) - {Outcome.SKIPPED}


def step_metrics(answered: Sequence[Answered], settled: Sequence[Settled]) -> dict[str, float]:
    """Rewards, scores and confidences per category and item, lengths, dead groups, and signs of a policy that cheats.

    `reward/...` is the rubric's own, `weighted/...` the sum of weight x score, comparable over time. Shares are of
    responses, `failed` of the verdicts that were due, `dead_groups` of the groups.
    """
    metrics: dict[str, float] = {}
    rewards: dict[str, list[float]] = defaultdict(list)
    weighted: dict[str, list[float]] = defaultdict(list)
    groups: dict[str, set[float]] = defaultdict(set)
    for one, result in zip(answered, settled, strict=True):
        question = one.asked.plan.question
        groups[question.question_id].add(result.advantage)
        if result.reward is not None and result.weighted is not None:
            rewards[question.category].append(result.reward)
            weighted[question.category].append(result.weighted)
    for name, values in (("reward", rewards), ("weighted", weighted)):
        spread(metrics, name, [value for category in values.values() for value in category])
        for category, some in sorted(values.items()):
            spread(metrics, f"{name}/{category}", some)
    metrics |= item_metrics([one.judged for one in answered])
    lengths = [len(one.token_ids) for one in answered]
    texts = [one.judged.response.text for one in answered]
    return metrics | {
        "length/mean": fmean(lengths),
        "length/max": float(max(lengths)),
        "truncated": fmean(one.finish == "length" for one in answered),
        "dead_groups": fmean(advantages == {0.0} for advantages in groups.values()),
        "unscorable": fmean(result.reward is None for result in settled),
        "off_policy": fmean(one.asked.route != "fresh" for one in answered),
        "refusals": fmean(map(is_refusal, texts)),
        "stock_phrases": fmean(
            stock_phrases(one.asked.plan.question, one.judged.response).score < 1 for one in answered
        ),
        "repetition": fmean(repeated(text, 4) for text in texts),
    }


def spread(metrics: dict[str, float], name: str, values: Sequence[float]) -> None:
    """The mean and the standard deviation (of all, n) of values, if there are any."""
    if values:
        metrics[f"{name}/mean"], metrics[f"{name}/std"] = fmean(values), pstdev(values)


def item_metrics(batch: Sequence[Judged]) -> dict[str, float]:
    """Mean score and mean confidence per category and item, and the share of failed verdicts."""
    scores: dict[str, list[float]] = defaultdict(list)
    confidences: dict[str, list[float]] = defaultdict(list)
    due = failed = 0
    for judged in batch:
        for item in judged.plan.applicable:
            verdict = judged.verdicts[item.id]
            due += verdict.outcome in DUE
            failed += verdict.outcome in DUE and verdict.score is None
            name = f"{judged.plan.question.category}/{item.id}"
            if verdict.score is not None:
                scores[name].append(verdict.score)
            if verdict.confidence is not None:
                confidences[name].append(verdict.confidence)
    means = {f"{what}/{name}": fmean(values) for what, of in (("score", scores), ("confidence", confidences))
             for name, values in sorted(of.items())}  # fmt: skip
    votes = {f"confidence_n/{name}": float(len(values)) for name, values in sorted(confidences.items())}
    return means | votes | {"failed": failed / due if due else 0.0}


def shifts(metrics: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """How far each item's mean confidence moved since it was last measured: eq. 15 weighs items by it."""
    return {
        f"confidence_shift/{name.removeprefix('confidence/')}": value - before[name]
        for name, value in metrics.items()
        if name.startswith("confidence/") and name in before
    }
