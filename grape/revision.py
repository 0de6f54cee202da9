"""The supervised phase of Constitutional AI: responses, criticised and revised by principles drawn at random."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import fmean
from time import perf_counter

from grape.batch import settle
from grape.collect import Collector, drawn_row
from grape.errors import JudgeError
from grape.item import Item
from grape.judge.critic import Critic
from grape.log import Log
from grape.material import Material
from grape.phases import POLICY, ConstitutionRun, SupervisedConfig
from grape.plan import Plan
from grape.principles import Step, drawn, frames, principles, request
from grape.records import Record, reward_row, step_row, verdict_rows
from grape.rollout import Rollout
from grape.step import StepReport
from grape.types import Message, Response

logger = logging.getLogger("grape")

Chats = Sequence[tuple[Message, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A response as it is after some rounds. ``round`` is the last in which it was revised: 0 for the initial one,
    which may be ``cut`` off."""

    plan: Plan
    number: int
    round: int = 0
    text: str = ""
    cut: bool = False

    @property
    def response_id(self) -> str:
        """Its name in the log."""
        return self.named(self.round)

    def named(self, round: int) -> str:
        """The name of the response of a round."""
        return f"{self.plan.question.question_id}-{round}-{self.number}"

    @property
    def response(self) -> Response:
        """As a response."""
        question = self.plan.question
        return Response(
            response_id=self.response_id, question_id=question.question_id, text=self.text, metadata=question.metadata
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the policy, or a judge, made of a request: a ``text``, or none and the reason why."""

    text: str | None = None
    failed: str = ""
    rollout: Rollout | None = None


class Revisions:
    """The chains of a run, round by round; each batch of questions is in the log when it is done."""

    def __init__(
        self, config: ConstitutionRun, run: str, store: Log, collector: Collector, material: Material,
        critics: Mapping[str, Critic], report: Callable[[StepReport], None] | None,
    ) -> None:  # fmt: skip
        assert config.supervised is not None, "the configuration asks for it"
        self._config = config
        self._supervised: SupervisedConfig = config.supervised
        self._run = run
        self._store = store
        self._collector = collector
        self._material = material
        self._critics = critics
        self._report = report
        self._frames = frames()
        stored = "select step, response_id, response, finish_reason = 'length' from responses where run = ?"
        self._known = {(step, name): (text, bool(cut)) for step, name, text, cut in store.query(stored, [run])}
        tried = store.query("select round, parent_id from revisions where run = ?", [run])
        self._tried: set[tuple[int, str]] = {(round, parent) for round, parent in tried}

    async def run(self) -> list[Chain]:
        """Every chain after its last round, in the order of the questions."""
        few, rounds = self._config.sampling.questions, self._supervised.rounds
        plans = list(self._material.plans.values())
        batches = [plans[start : start + few] for start in range(0, len(plans), few)]
        logged = {step for (step,) in self._store.query("select step from steps where run = ?", [self._run])}
        chains = [self._begun(batch, whole=0 in logged) for batch in batches]
        for round in range(rounds + 1):
            started, failures = datetime.now(UTC), Counter[str]()
            for number, batch in enumerate(chains):
                clock = perf_counter()
                chains[number] = await self._round(round, number, batch, failures, known=round in logged)
                if self._report:
                    done = StepReport(
                        step=round * len(chains) + number + 1,
                        steps=(rounds + 1) * len(chains),
                        metrics={},
                        seconds=perf_counter() - clock,
                    )
                    self._report(done)
            if round not in logged:
                self._close(round, [chain for batch in chains for chain in batch], started, failures)
        return [chain for batch in chains for chain in batch]

    def _begun(self, plans: Sequence[Plan], *, whole: bool) -> list[Chain]:
        """The chains of a batch; once the first round is ``whole``, those that it began."""
        counts = [self._supervised.responses if principles(plan) else self._supervised.helpful for plan in plans]
        chains = [Chain(plan=plan, number=n) for plan, count in zip(plans, counts, strict=True) for n in range(count)]
        return [chain for chain in chains if not whole or (0, chain.response_id) in self._known]

    async def _round(
        self, round: int, number: int, chains: Sequence[Chain], failures: Counter[str], *, known: bool
    ) -> list[Chain]:
        """The chains of a batch after a round: from the log, where it has tried any of them."""
        stored = [self._known.get((round, chain.named(round))) for chain in chains]
        tried = any(one is not None for one in stored) or any((round, c.response_id) in self._tried for c in chains)
        if not (known or tried):
            stored = await (self._revised if round else self._initial)(round, number, chains, failures)
        return [
            chain if one is None else replace(chain, round=round, text=one[0], cut=one[1])
            for chain, one in zip(chains, stored, strict=True)
        ]

    async def _initial(
        self, round: int, number: int, chains: Sequence[Chain], failures: Counter[str]
    ) -> list[tuple[str, bool] | None]:
        """The first responses."""
        asked = [self._collector.fresh(chain.plan, chain.named(0)) for chain in chains]
        rollouts = await self._collector.drawn([one.prompt_ids for one in asked], *self._seed(round, number, "asked"))
        rows = [
            drawn_row(
                self._run, 0, chain.plan.question, one.response_id, rollout, route="fresh", prompt_hash=one.prompt_hash
            )
            for one, chain, rollout in zip(asked, chains, rollouts, strict=True)
        ]
        made = [replace(chain, text=rollout.text) for chain, rollout in zip(chains, rollouts, strict=True)]
        self._store.append(responses=rows, **await self._scored(0, made))
        return [(rollout.text, rollout.finish == "length") for rollout in rollouts]

    async def _revised(
        self, round: int, number: int, chains: Sequence[Chain], failures: Counter[str]
    ) -> list[tuple[str, bool] | None]:
        """What the responses become in a round; None where one stays as it was."""
        places = [place for place, chain in enumerate(chains) if principles(chain.plan)]
        some = [chains[place] for place in places]
        items = [drawn(chain.plan, self._config.seed, "principle", round, chain.response_id) for chain in some]
        critiques = await self._said("critique", round, number, some, items, {})
        texts = {place: said.text for place, said in enumerate(critiques) if said.text is not None}
        revisions = await self._said("revision", round, number, some, items, texts)
        self._collector.panel.see_budgets()
        responses, rows, made = list[Record](), list[Record](), list[Chain]()
        results: list[tuple[str, bool] | None] = [None] * len(chains)
        for place, (chain, item, said) in enumerate(zip(some, items, revisions, strict=True)):
            rows.append(self._revision(chain, round, item, texts.get(place), said.text))
            if said.text is None:
                failures[critiques[place].failed or said.failed] += 1
                continue
            results[places[place]] = (said.text, False)
            made.append(replace(chain, round=round, text=said.text))
            responses.append(self._row(chain, round, said))
        self._store.append(responses=responses, revisions=rows, **await self._scored(round, made))
        return results

    async def _said(
        self, step: Step, round: int, number: int, chains: Sequence[Chain], items: Sequence[Item],
        critiques: Mapping[int, str],
    ) -> list[Said]:  # fmt: skip
        """A critique of every response, or a revision of those with ``critiques``."""
        who = self._supervised.critic if step == "critique" else self._supervised.reviser
        places = range(len(chains)) if step == "critique" else sorted(critiques)
        texts = {
            place: {"question": chains[place].plan.question.prompt, "response": chains[place].text}
            | ({"critique": critiques[place]} if step == "revision" else {})
            for place in places
        }
        if who != POLICY:
            judge = self._critics[who]
            done = await asyncio.gather(
                *(self._by_judge(judge, step, chains[place], items[place], texts[place]) for place in places)
            )
        else:
            chats = [request(self._frames[step], items[place], step, texts[place]) for place in places]
            done = await self._by_policy([chains[place].plan for place in places], chats, round, number, step)
        found = dict(zip(places, done, strict=True))
        return [found.get(place, Said()) for place in range(len(chains))]

    async def _by_judge(self, judge: Critic, step: Step, chain: Chain, item: Item, texts: Mapping[str, str]) -> Said:
        try:
            said = await judge.prose(
                step,
                chain.plan.question,
                chain.response,
                item,
                lambda mark: request(self._frames[step], item, step, texts, mark),
            )
        except JudgeError as error:
            return Said(failed=f"{step}: {error.outcome}")
        return Said(text=said)

    async def _by_policy(
        self, plans: Sequence[Plan], chats: Chats, round: int, number: int, step: Step
    ) -> list[Said]:  # fmt: skip
        prompts = []
        for plan, chat in zip(plans, chats, strict=True):
            parts = {message["role"]: message["content"] for message in chat}
            question = replace(plan.question, text=parts.get("user", ""))
            prompts.append(self._collector.prompt(question, parts.get("system")))
        fitting = [place for place, ids in enumerate(prompts) if self._collector.fits(ids)]
        rollouts = await self._collector.drawn([prompts[p] for p in fitting], *self._seed(round, number, step))
        whole = self._config.truncation.how != "keep"
        said = {place: _by(rollout, step, whole=whole) for place, rollout in zip(fitting, rollouts, strict=True)}
        return [said.get(place, Said(failed=f"{step}: no room in the context")) for place in range(len(prompts))]

    def _seed(self, round: int, number: int, what: str) -> tuple[object, ...]:
        return (self._config.seed, "constitution", round, number, what)

    def _row(self, chain: Chain, round: int, said: Said) -> Record:
        """A row of the log's `responses` for a revision; its step is the round."""
        question, name = chain.plan.question, chain.named(round)
        more = {"route": "improve", "parent_id": chain.response_id}
        if said.rollout is not None:
            return drawn_row(self._run, round, question, name, said.rollout, **more)
        return {
            "run": self._run, "step": round, "response_id": name, "question_id": question.question_id,
            "category": question.category, "response": said.text, "created": datetime.now(UTC), **more,
        }  # fmt: skip

    def _revision(self, chain: Chain, round: int, item: Item, critique: str | None, revision: str | None) -> Record:
        """A row of the log's `revisions`, also of an attempt that came to nothing."""
        return {
            "run": self._run, "question_id": chain.plan.question.question_id, "round": round,
            "parent_id": chain.response_id, "response_id": revision and chain.named(round), "item": item.id,
            "criterion": item.criterion, "critique": critique, "revision": revision, "created": datetime.now(UTC),
        }  # fmt: skip

    async def _scored(self, round: int, chains: Sequence[Chain]) -> dict[str, list[Record]]:
        """The verdicts on the responses of a round, where they are asked for."""
        if not self._supervised.score or not chains:
            return {}
        judged = await self._collector.panel.judge_all([(chain.plan, chain.response) for chain in chains])
        settled, now = settle(judged), datetime.now(UTC)
        pairs, judges = list(zip(judged, settled, strict=True)), self._material.judges
        return {
            "verdicts": [row for pair in pairs for row in verdict_rows(self._run, round, *pair, judges, now)],
            "rewards": [reward_row(self._run, round, *pair, "group_mean", "none", now) for pair in pairs],
        }

    def _close(self, round: int, chains: Sequence[Chain], started: datetime, failures: Counter[str]) -> None:
        """The row of `steps` that says that a round is whole."""
        due = [chain for chain in chains if principles(chain.plan)]
        changed = fmean(chain.round == round for chain in due) if due else 0.0
        metrics = {"revised": changed} if round else {}
        row = step_row(self._run, round, (), (), started)
        counts = {"num_questions": len({chain.plan.question.question_id for chain in chains})}
        seen = "select count(*), count(*) filter (outcome not in ('ok', 'skipped')) from verdicts where applicable and "
        found = self._store.query(f"{seen} run = ? and step = ?", [self._run, round])
        counts["num_verdicts"], counts["num_failed"] = found[0]
        counts["num_responses"] = sum(chain.round == round for chain in chains)
        self._store.append(steps=[{**row, **counts, "metrics": json.dumps(metrics)}])
        if failures:
            told = ", ".join(f"{count} {why}" for why, count in failures.most_common())
            logger.warning(
                "round %d: %d of %d responses stay as they were: %s", round, failures.total(), len(due), told
            )


def _by(rollout: Rollout, step: Step, *, whole: bool) -> Said:
    """What the policy said: nothing where it is empty, or was cut off and has to be ``whole``."""
    if whole and rollout.finish != "stop":
        return Said(failed=f"{step}: cut off")
    return Said(text=rollout.text, rollout=rollout) if rollout.text.strip() else Said(failed=f"{step}: empty")
