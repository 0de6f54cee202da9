"""The judges, reward models and checkers at work: one response in, one verdict for each of its items out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

from grape.batch import Judged, fails_gate
from grape.checkers import check_response, registry
from grape.crew import Progress, all_done
from grape.errors import GrapeError
from grape.item import Item
from grape.judge.critic import Critic
from grape.judge.jury import Jury
from grape.judge.reward_model import RewardModel
from grape.plan import Plan
from grape.types import Outcome, Question, Response, Verdict

if TYPE_CHECKING:
    from grape.sandbox import Sandbox


class Panel:
    """Judges any number of responses at once on one event loop; each is judged as soon as it is given.

    Gates come first, checkers before judges, since a failed gate spares every other item of its response. Checkers
    run in threads, those of a response in one, programs in ``sandbox`` (default: confined on this machine). A panel
    owns its critics and closes them.
    """

    def __init__(self, critics: Mapping[str, Critic | Jury], sandbox: Sandbox | None = None) -> None:
        self._critics = critics
        self._sandbox = sandbox
        self._reward_models: dict[str, RewardModel] = {}
        self._num_threads = max(4, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="grape-checker")

    async def __aenter__(self) -> Panel:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.gather(*(model.close() for model in self._models()))

    def check(self, plans: Iterable[Plan]) -> None:
        """See that every judge's prompts can serve the items that it is asked; a `ConfigError` where not."""
        plans, seen = list(plans), set[tuple[object, ...]]()
        for plan in plans:
            for item in plan.applicable:
                key = (item.id, item.judge, item.critique, item.reference)
                if item.judge is not None and key not in seen:
                    seen.add(key)
                    self._critics[item.judge].check(item)
        for name in {item.reward_model for plan in plans for item in plan.applicable if item.reward_model}:
            self._reward_model(name)  # for `reach`

    async def reach(self) -> None:
        """See that every judge and reward model is there; a `ConfigError` of one line for the first that is not."""
        await asyncio.gather(*(model.reach() for model in self._models()))

    @property
    def width(self) -> int:
        """How many responses are worth having in hand: enough to keep every judge and thread busy."""
        return 2 * (self._num_threads + sum(critic.width for critic in self._critics.values()))

    async def judge(self, plan: Plan, response: Response) -> Judged:
        """One verdict for each leaf of the plan."""
        items = plan.applicable
        verdicts = {
            leaf.id: Verdict(item=leaf.id, outcome=Outcome.NOT_APPLICABLE, attempts=0)
            for leaf in plan.leaves
            if plan.weight[leaf.id] == 0
        }
        for item in sorted((item for item in items if item.gate), key=lambda item: item.kind != "check"):
            verdict = verdicts[item.id] = await self.ask(plan.question, response, item)
            if fails_gate(item, verdict):
                skipped = {i.id: _skipped(i, item) for i in items if i.id not in verdicts}
                return Judged(response=response, plan=plan, verdicts=verdicts | skipped)
        rest = {item.id: item for item in items if item.id not in verdicts}
        quick = {name: item for name, item in rest.items() if item.check and not registry()[item.check].sandboxed}
        by_judge: dict[str, list[Item]] = {}
        for item in rest.values():
            if item.judge is not None:
                by_judge.setdefault(item.judge, []).append(item)
        others = [item for item in rest.values() if item.judge is None and item.id not in quick]
        checked, judged, asked = await asyncio.gather(
            self._checked(plan.question, response, list(quick.values())),
            asyncio.gather(
                *(self._critics[name].verdicts(plan.question, response, by_judge[name]) for name in by_judge)
            ),
            asyncio.gather(*(self.ask(plan.question, response, item) for item in others)),
        )
        verdicts |= {verdict.item: verdict for some in (checked, *judged, asked) for verdict in some}
        return Judged(response=response, plan=plan, verdicts=verdicts)

    async def judge_all(self, work: Sequence[tuple[Plan, Response]], progress: Progress | None = None) -> list[Judged]:
        """Every response judged, in the order given, with `width` of them in hand at a time."""
        done = await all_done(work, lambda one: self.judge(*one), self.width, stop=self.refused, progress=progress)
        self.see_budgets()
        return [one for one in done if one is not None]

    def see_budgets(self) -> None:
        """`GrapeError` of one line where a judge was not asked because its budget is spent: a batch is then not whole.

        What was answered is in the log, so that a run that is resumed asks only for what is missing.
        """
        for critic in self.refused():
            raise GrapeError(critic.meter.advice)

    def refused(self) -> list[Critic]:
        """The judges that were not asked because their budgets are spent."""
        return [critic for critic in self._critics.values() if isinstance(critic, Critic) and critic.meter.refused]

    async def ask(self, question: Question, response: Response, item: Item) -> Verdict:
        """The verdict on one item."""
        if item.judge is not None:
            return await self._critics[item.judge].verdict(question, response, item)
        if item.reward_model is not None:
            return await self._reward_model(item.reward_model).verdict(question, response, item)
        (verdict,) = await self._checked(question, response, [item])
        return verdict

    async def _checked(self, question: Question, response: Response, items: Sequence[Item]) -> list[Verdict]:
        """The verdicts of checkers, one behind the other in one thread: most take less time than to hand them over."""

        def check() -> list[Verdict]:
            return [_check(item, question, response, self._sandbox) for item in items]

        return await asyncio.get_running_loop().run_in_executor(self._threads, check) if items else []

    def _models(self) -> list[Critic | Jury | RewardModel]:
        return [*self._critics.values(), *self._reward_models.values()]

    def _reward_model(self, name: str) -> RewardModel:
        if name not in self._reward_models:
            self._reward_models[name] = RewardModel(name)
        return self._reward_models[name]


def _check(item: Item, question: Question, response: Response, sandbox: Sandbox | None) -> Verdict:
    assert item.check is not None, "a plan has no other kind of item"
    start = perf_counter()
    verdict = check_response(item.id, item.check, item.arguments, item.confidence, question, response, sandbox)
    return replace(verdict, latency=perf_counter() - start)


def _skipped(item: Item, gate: Item) -> Verdict:
    return Verdict(item=item.id, outcome=Outcome.SKIPPED, detail=f"{gate.id} failed its gate", attempts=0)
