"""A preference model that is made here, on real pairs that it has not seen: the 2,312 of Anthropic's HH, harmless base.

    python benchmarks/hh.py [--seed 0] [--draws 2000]

Prints how many rows are broken, and for each of three ways to tell the better response the share of held-out pairs that
it gets right (Wilson's 95 % interval; equal values count half), and how much more the first one does (a paired
bootstrap over the questions that the dialogues open with). All is cross-validated in 5 folds. Dialogues that open with
the same question are in one fold, and what is otherwise like a held-out dialogue (8-grams) is not learned from
(examples/hh/make.py).

* grape reward-model: examples/hh/reward-model.yaml, each fold with a tokenizer and a model of its own; the values are
  those that `reward_model:` items give.
* TF-IDF: words of two letters on, log(n / df) with both plus 1, plus 1, rows of length 1; logistic regression on the
  difference of a pair's rows, without an intercept, with a ridge of C = 0.5.
* shorter: the response of fewer characters.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stall a busy machine
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

from grape.agreement import Floats, folds, interval, mean, wilson
from grape.item import Item
from grape.judge.reward_model import RewardModel
from grape.lessons import Lesson
from grape.recipes import RewardModelRun, load_recipe
from grape.tuning import tune
from grape.types import Question, Response

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/hh"
sys.path.append(str(EXAMPLE))
from make import DATA, FOLDS, make_model, opening, parted, read_pairs, texts, write  # noqa: E402

WORD = re.compile(r"\b\w\w+\b")
RIDGE = 0.5  # C of the logistic regression: what is lost on the pairs, against half of the squared weights

Way = Callable[[Sequence[Lesson], Sequence[Lesson], int], Floats]  # the gaps of held-out pairs, better minus worse


def by_model(taught: Sequence[Lesson], heldout: Sequence[Lesson], seed: int) -> Floats:
    """The gaps by a reward model that `grape reward-model` has trained."""
    with TemporaryDirectory() as folder:
        here = Path(folder)
        write(here / "pairs.jsonl", taught)
        write(here / "heldout.jsonl", heldout)
        make_model(here / "model", texts(taught), seed)
        given = {
            "policy.model": here / "model", "data.path": here / "pairs.jsonl", "heldout.data": here / "heldout.jsonl",
            "checkpoint.dir": here / "reward-model", "log": here / "hh.duckdb", "seed": seed,
        }  # fmt: skip
        run = load_recipe(
            RewardModelRun, EXAMPLE / "reward-model.yaml", [f"{at}={value}" for at, value in given.items()]
        )
        return asyncio.run(_gaps(str(tune(run).folder), heldout))


async def _gaps(model: str, lessons: Sequence[Lesson]) -> Floats:
    """Each pair's values as a `reward_model:` item has them, better minus worse."""
    item = Item.model_validate({"id": "preferred", "reward_model": model, "raw": True})
    judge = RewardModel(model)
    gaps = []
    for one in lessons:
        question = Question(question_id=one.place, category="", text=one.prompt)
        values = []
        for text in one.responses:
            said = Response(question_id=one.place, response_id=one.place, text=text)
            verdict = await judge.verdict(question, said, item)
            assert verdict.score is not None, verdict.detail
            values.append(verdict.score)
        gaps.append(values[0] - values[1])
    await judge.close()
    return np.array(gaps)


def by_words(taught: Sequence[Lesson], heldout: Sequence[Lesson], seed: int) -> Floats:
    """The gaps by logistic regression on TF-IDF."""
    said = [Counter(WORD.findall(text.lower())) for text in texts(taught)]
    frequency = Counter(word for words in said for word in words)
    column = {word: at for at, word in enumerate(frequency)}
    idf = {word: np.log((1 + len(said)) / (1 + df)) + 1 for word, df in frequency.items()}

    def gaps(lessons: Sequence[Lesson]) -> torch.Tensor:
        rows = np.zeros((2 * len(lessons), len(column)), dtype=np.float32)
        for row, text in zip(rows, texts(lessons), strict=True):
            for word, times in Counter(WORD.findall(text.lower())).items():
                if word in column:
                    row[column[word]] = times * idf[word]
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
        return torch.from_numpy(rows[::2] - rows[1::2])

    known_PV = gaps(taught)
    weight_V = torch.zeros(len(column), requires_grad=True)
    descent = torch.optim.LBFGS([weight_V], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        descent.zero_grad()
        lost = RIDGE * torch.nn.functional.softplus(-known_PV @ weight_V).sum() + weight_V @ weight_V / 2
        lost.backward()  # type: ignore[no-untyped-call]
        return lost

    descent.step(loss)  # type: ignore[arg-type]
    return (gaps(heldout) @ weight_V.detach()).double().numpy()


def by_length(taught: Sequence[Lesson], heldout: Sequence[Lesson], seed: int) -> Floats:
    """By how many characters the better response is the shorter one."""
    return np.array([float(len(one.responses[1]) - len(one.responses[0])) for one in heldout])


WAYS: dict[str, Way] = {"grape reward-model": by_model, "TF-IDF, logistic": by_words, "always the shorter": by_length}


def right(gap_P: Floats) -> Floats:
    """1 where the better response has the greater value, 0 where the other has, 0.5 where neither."""
    return 0.5 + 0.5 * np.sign(gap_P)


def validated(way: Way, lessons: Sequence[Lesson], fold_P: np.ndarray[Any, Any], seed: int) -> Floats:
    """Which pairs a way gets right when it has learned from the other folds."""
    right_P = np.full(len(lessons), np.nan)
    for fold in np.unique(fold_P):
        taught, heldout = parted(lessons, fold_P == fold)
        right_P[fold_P == fold] = right(way(taught, heldout, seed))
    return right_P


def main() -> None:
    """Print the counts and the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--seed", type=int, default=0, help="of the folds, and of the model's first weights")
    parser.add_argument("--draws", type=int, default=2000)
    args = parser.parse_args()
    lessons, skipped = read_pairs(args.data)
    opening_P = np.array([opening(one) for one in lessons])
    fold_P = folds(opening_P, FOLDS, args.seed)
    number = len(lessons)
    print(f"{number + len(skipped)} rows, {len(skipped)} of them broken: {number} pairs in {FOLDS} folds", flush=True)
    print(f"{'':20}{'right':>20}{'the first has more':>24}   in each fold")
    first_P: Floats | None = None
    for name, way in WAYS.items():
        right_P = validated(way, lessons, fold_P, args.seed)
        share = f"{right_P.mean():.3f} [{' '.join(f'{bound:.3f}' for bound in wilson(right_P.mean(), number))}]"
        more = ""
        if first_P is None:
            first_P = right_P
        else:
            gain_P = first_P - right_P
            gain = interval(lambda weight, g=gain_P: mean(g, weight), opening_P, draws=args.draws, seed=args.seed)  # type: ignore[misc]
            more = f"{gain.value:+.3f} [{gain.low:+.3f} {gain.high:+.3f}]"
        each = " ".join(f"{right_P[fold_P == fold].mean():.3f}" for fold in range(FOLDS))
        print(f"{name:20}{share:>20}{more:>24}   {each}", flush=True)


if __name__ == "__main__":
    main()
