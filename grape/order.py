"""Which questions a step takes: by their order, and which are neither too easy nor too hard to be taken at all."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum

from grape.config import DifficultyConfig, QuestionsConfig
from grape.errors import ConfigError
from grape.questions import Questions, is_number

SPREAD = 0.2  # of the curriculum: standard deviation, as a share of all questions


def keep_by_difficulty(
    scores: Mapping[str, Sequence[float]], config: DifficultyConfig
) -> tuple[list[str], dict[str, float]]:
    """The questions whose mean score is from ``low`` to ``high``, and the difficulty of all: 1 - mean.

    A question none of whose responses could be scored is left out.
    """
    means = {name: fsum(of) / len(of) for name, of in scores.items() if of}
    kept = [name for name, mean in means.items() if config.low - 1e-9 <= mean <= config.high + 1e-9]
    if not kept:
        found = f"from {min(means.values()):.3g} to {max(means.values()):.3g}" if means else "not there"
        raise ConfigError(
            f"questions.difficulty: none of {len(scores)} questions has a mean score from {config.low:g} to "
            f"{config.high:g}; the means are {found}"
        )
    return kept, {name: 1 - mean for name, mean in means.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Which questions a step takes, as a function of the seed and of how many were drawn before: the position.

    given: as they stand, again and again. shuffled: every epoch takes each question once, in its own permutation; it
    begins with none that ended the last one, so that a step across the border needs no question twice.

    easy-to-hard: each draw is a question whose rank by difficulty is normal about the progress of the run, so that the
    easy ones fade out gradually (the Gaussian schedule of E2H, https://arxiv.org/abs/2506.06632, over ranks instead of
    a few levels and linear in time): density(rank) ~ exp(-(rank - progress)^2 / (2 SPREAD^2)), rank and progress in
    [0, 1]. No epoch has to be complete there.
    """

    ids: tuple[str, ...]
    how: str
    seed: int
    count: int  # what a step takes
    total: int  # what the whole run takes
    _epoch: dict[int, list[str]] = field(default_factory=dict, repr=False, compare=False)  # the last one asked for

    @classmethod
    def of(
        cls, questions: Questions, ids: Sequence[str], config: QuestionsConfig, *, seed: int, count: int, steps: int,
        difficulty: Mapping[str, float] | None = None,
    ) -> Order:  # fmt: skip
        """The order of these questions; by ``difficulty`` where not every row states one."""
        if count > len(ids):
            raise ConfigError(
                f"sampling.questions: {count} a step, but {questions.rows.source} has only {len(ids)} that can be used"
            )
        if config.order == "easy-to-hard":
            stated = {name: questions.rows.questions[name].get("difficulty") for name in ids}
            if difficulty is None or all(is_number(value) for value in stated.values()):
                difficulty = stated
            ids = sorted(ids, key=lambda name: (difficulty[name], name))
        return cls(ids=tuple(ids), how=config.order, seed=seed, count=count, total=count * steps)

    def __len__(self) -> int:
        return len(self.ids)

    def draw(
        self, position: int, count: int, taken: Collection[str] = (), *, due: int | None = None
    ) -> tuple[list[str], int]:
        """The next questions and the position after them, none of those ``taken``, which the same step has drawn.

        Fewer than ``count`` only where no other question is left. ``due`` is how many the steps before had to take, by
        which easy-to-hard goes: the position is ahead of it where steps drew further ones.
        """
        due = position if due is None else due
        out = set(taken)
        drawn: list[str] = []
        count = min(count, len(self.ids) - len(out))
        while len(drawn) < count:
            question_id = (
                self._ranked(position, due + len(drawn), out) if self.how == "easy-to-hard" else self._turn(position)
            )
            position += 1
            if question_id not in out:
                drawn.append(question_id)
                out.add(question_id)
        return drawn, position

    def _turn(self, position: int) -> str:
        """Whose turn it is at a position."""
        epoch, place = divmod(position, len(self.ids))
        if self.how == "given":
            return self.ids[place]
        if epoch not in self._epoch:
            done = max((other for other in self._epoch if other < epoch), default=-1)
            ids = self._epoch.get(done, [])
            for number in range(done + 1, epoch + 1):
                shuffled = list(self.ids)
                random.Random(f"{self.seed}/questions/{number}").shuffle(shuffled)
                ids = _apart(ids, shuffled, self.count)
            self._epoch.clear()
            self._epoch[epoch] = ids
        return self._epoch[epoch][place]

    def _ranked(self, position: int, due: int, out: Collection[str]) -> str:
        """A question by its rank, or the next to it that is not out."""
        draws = random.Random(f"{self.seed}/questions/{position}")
        progress = min(due / max(self.total - 1, 1), 1.0)
        while not 0 <= (rank := draws.gauss(progress, SPREAD)) < 1:
            pass
        here = int(rank * len(self.ids))
        near = sorted(range(len(self.ids)), key=lambda place: abs(place - here)) if self.ids[here] in out else [here]
        return next(self.ids[place] for place in near if self.ids[place] not in out)


def _apart(before: Sequence[str], shuffled: Sequence[str], span: int) -> list[str]:
    """The shuffled, each put off until it is ``span`` turns from its turn in the epoch ``before``."""
    late = {name: span - back for back, name in enumerate(reversed(before), 1) if back < span}
    ordered: list[str] = []
    held: list[str] = []
    coming = iter(shuffled)
    while len(ordered) < len(shuffled):
        free = next((name for name in held if late.get(name, 0) <= len(ordered)), None)
        if free is not None:
            held.remove(free)
            ordered.append(free)
        elif late.get(name := next(coming), 0) <= len(ordered):
            ordered.append(name)
        else:
            held.append(name)
    return ordered
