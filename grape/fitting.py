"""What a judge's confidence is worth, from its verdicts beside gold labels: a map of it, or a constant, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from grape.agreement import (
    BINS,
    DRAWS,
    Floats,
    Interval,
    calibration_error,
    equal_mass,
    folds,
    intervals,
    is_right,
    isotonic,
    kappa,
    mean,
    spearman,
)
from grape.gold import Case
from grape.judge.calibration import Map

FOLDS = 10
HALVINGS = 10
MOST_ROUGH = 100  # resamples at least of a decision on a half
FEWEST = 20  # questions below which nothing is decided


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Verdicts that have a score, as columns: score, stated confidence, gold score, and what is resampled whole."""

    score: Floats
    stated: Floats
    gold: Floats
    cluster: NDArray[np.str_]
    tolerance: float = 0.5

    @staticmethod
    def of(cases: Sequence[Case], tolerance: float = 0.5) -> Sample:
        """The columns of the cases that a judge gave a score on."""
        scored = [case for case in cases if case.score is not None]
        return Sample(
            score=np.array([case.score for case in scored], dtype=np.float64),
            stated=np.array([1.0 if case.stated is None else case.stated for case in scored], dtype=np.float64),
            gold=np.array([case.gold for case in scored], dtype=np.float64),
            cluster=np.array([case.cluster for case in scored], dtype=np.str_),
            tolerance=tolerance,
        )

    def __getitem__(self, rows: NDArray[np.bool_]) -> Sample:
        return Sample(
            score=self.score[rows], stated=self.stated[rows], gold=self.gold[rows], cluster=self.cluster[rows],
            tolerance=self.tolerance,
        )  # fmt: skip

    @property
    def right(self) -> Floats:
        """1 where the verdict is on the gold's side."""
        return is_right(self.score, self.gold, self.tolerance)

    @property
    def questions(self) -> int:
        """How many of what is resampled whole."""
        return len(np.unique(self.cluster))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What stands for a judge's confidence from now on, and why; ``map`` is None where it stays as stated."""

    map: Map | None
    why: str
    kappa: Interval
    rank: Interval

    def __call__(self, confidence_S: Floats) -> Floats:
        """The confidences that it makes of stated ones."""
        return confidence_S if self.map is None else apply(self.map, confidence_S)


def apply(map_: Map, confidence_S: Floats) -> Floats:
    """A map of many confidences at once."""
    return np.array([map_(confidence) for confidence in confidence_S.tolist()], dtype=np.float64)


def decide(sample: Sample, *, seed: int = 0, draws: int = DRAWS, fewest: int = FEWEST) -> Decision:
    """The rule of `grape calibrate`, by bounds of 95 % bootstrap intervals over whole questions.

    Not beyond chance (lower bound of kappa not above 0): 0. Beyond chance, but its confidence does not order its
    errors (lower bound of the rank correlation not above 0): a constant, its accuracy. Else the isotonic map, unless
    the constant has the lower squared error where both are cross-validated. Of few questions, or golds that are all
    alike, nothing follows: the confidence stays as it is.
    """
    right = sample.right
    chance, rank = intervals(
        [
            lambda weight: kappa(sample.score, sample.gold, tolerance=sample.tolerance, weight_BS=weight),
            lambda weight: spearman(sample.stated, right, weight),
        ],
        sample.cluster,
        draws=draws,
        seed=seed,
    )
    map_, why = _rule(sample, chance, rank, seed, fewest)
    return Decision(map=map_, why=why, kappa=chance, rank=rank)


def _rule(sample: Sample, chance: Interval, rank: Interval, seed: int, fewest: int) -> tuple[Map | None, str]:
    if sample.questions < fewest:
        return None, f"{sample.questions} questions, {fewest} are needed"
    if len(np.unique(sample.gold)) == 1:
        return None, "every gold label is the same"
    if not chance.above_zero:
        return Map(kind="zero"), "not beyond chance"
    constant = _constant(sample)
    if not rank.above_zero:
        return constant, "confidence does not order its errors"
    if _loss(sample, _isotonic, seed) >= _loss(sample, _constant, seed):
        return constant, "no better by its confidence, cross-validated"
    return _isotonic(sample), "confidence orders its errors"


def _constant(sample: Sample) -> Map:
    return Map(kind="constant", y=[float(sample.right.mean())])


def _isotonic(sample: Sample) -> Map:
    x, y = isotonic(sample.stated, sample.right)
    return Map(kind="isotonic", x=x, y=y)


def _loss(sample: Sample, fit: Callable[[Sample], Map], seed: int) -> float:
    """The Brier score of a kind of map, each question mapped by what was fitted to the others."""
    fold = folds(sample.cluster, FOLDS, seed)
    mapped = np.empty(len(fold))
    for held in np.unique(fold):
        mapped[fold == held] = apply(fit(sample[fold != held]), sample.stated[fold == held])
    return float(mean((mapped - sample.right) ** 2)[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """S verdicts in R random halvings of their questions, each mapped by what was decided on the other half.

    A map looks better than it is on what it was fitted to, and so it does on average over all folds: where one fold is
    right too often, the map of the others is too low. Here an error is taken within a half, which one map has mapped.
    """

    mapped: Floats
    half: NDArray[np.intp]

    def error(self, right_S: Floats, weight_BS: Floats, confidence_S: Floats | None = None) -> Floats:
        """The calibration error on held-out halves, a mean over the halvings; of other confidences on the same."""
        errors = []
        for mapped, half in zip(self.mapped, self.half, strict=True):
            confidence = mapped if confidence_S is None else confidence_S
            bins = np.where(half == 1, BINS, 0)
            for side in (0, 1):
                bins[half == side] += equal_mass(confidence[half == side])
            errors.append(calibration_error(confidence, right_S, bin_S=bins, weight_BS=weight_BS))
        return np.asarray(np.mean(errors, axis=0))


def held_out(sample: Sample, *, seed: int = 0, draws: int = DRAWS) -> HeldOut:
    """Every verdict mapped by what the whole rule decides on the questions of the other half."""
    fewest = 2 if sample.questions >= FEWEST else FEWEST  # what is enough in all is not too little in half
    half = np.stack([folds(sample.cluster, 2, seed + number) for number in range(HALVINGS)])
    mapped = np.empty(half.shape)
    for number, side in product(range(HALVINGS), (0, 1)):
        held = half[number] == side
        decision = decide(sample[~held], seed=seed, draws=max(MOST_ROUGH, draws // 10), fewest=fewest)
        mapped[number, held] = decision(sample.stated[held])
    return HeldOut(mapped=mapped, half=half)


def joined(parts: Sequence[HeldOut]) -> HeldOut:
    """Several groups' verdicts, one behind the other, each mapped by its own group's rule."""
    return HeldOut(
        mapped=np.concatenate([part.mapped for part in parts], axis=1),
        half=np.concatenate([part.half for part in parts], axis=1),
    )
