"""Whether calibrated confidence makes better rewards: LLMBar's stored votes of three judges, against its labels.

    python benchmarks/calibration.py [--seed 0] [--draws 2000] [--pandalm FILE]

A group is the two outputs of a comparison, in one order; its items are the three judges, of equal weight, each with the
share of its votes for an output as the score. Rewards are eq. 15 by `grape.reward` with the confidence as it is (the
share of the majority), calibrated on other pairs (10 folds; a fold is a batch), or left out (`weighted`). A ranking is
right where the output that people prefer has the greater reward, and half right where both are equal or have none.
Intervals are bootstraps over whole pairs, those of differences paired.

Then how far PandaLM's three labelers agree (999 pairs of responses; labels from WeOpenML/PandaLM, Apache-2.0).
"""

from __future__ import annotations

import argparse
import gzip
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grape.agreement import Floats, alpha, folds, intervals, mean
from grape.fitting import Sample, decide
from grape.reliability import spread
from grape.reward import rubric_reward

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/llmbar"
JUDGES = ("GPT-4", "ChatGPT", "LLaMA2")
FOLDS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Votes:
    """C comparisons by three judges: the share of votes for the first output, and whether people prefer it."""

    share_CJ: Floats
    gold_C: Floats
    pair_C: np.ndarray[Any, Any]
    subset_C: np.ndarray[Any, Any]

    @property
    def confidence_CJ(self) -> Floats:
        """The share of the majority."""
        return np.maximum(self.share_CJ, 1 - self.share_CJ)


def lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines, packed or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


def read_votes() -> Votes:
    """The example's copy of the votes."""
    label = {row["id"]: row["label"] for row in lines(EXAMPLE / "llmbar_ratings.jsonl.gz") if row["kind"] == "pair"}
    found: dict[tuple[str, bool], dict[str, float]] = {}
    for row in lines(EXAMPLE / "llmbar_votes.jsonl.gz"):
        first = 2 if row["swapped"] else 1
        named = [winner == first for winner in row["winner"].values() if winner is not None]
        found.setdefault((row["id"], row["swapped"]), {})[row["judge"]] = float(np.mean(named))
    return Votes(
        share_CJ=np.array([[shares[judge] for judge in JUDGES] for shares in found.values()]),
        gold_C=np.array([float(label[pair] == (2 if swapped else 1)) for pair, swapped in found]),
        pair_C=np.array([pair for pair, _ in found]),
        subset_C=np.array([pair.split("-")[0] for pair, _ in found]),
    )


def calibrated(votes: Votes, fold_C: np.ndarray[Any, Any], groups_C: np.ndarray[Any, Any], seed: int) -> Floats:
    """Each confidence as `grape calibrate` would have it without the pairs of its fold, by group of comparisons."""
    confidence = votes.confidence_CJ.copy()
    for group in np.unique(groups_C):
        for fold in np.unique(fold_C):
            fitted, held = (groups_C == group) & (fold_C != fold), (groups_C == group) & (fold_C == fold)
            for j in range(len(JUDGES)):
                sample = Sample(
                    score=np.where(votes.share_CJ[:, j] == 0.5, 0.5, votes.share_CJ[:, j] > 0.5)[fitted],
                    stated=votes.confidence_CJ[fitted, j],
                    gold=votes.gold_C[fitted],
                    cluster=votes.pair_C[fitted].astype(np.str_),
                )
                confidence[held, j] = decide(sample, seed=seed)(votes.confidence_CJ[held, j])
    return confidence


def ranked(votes: Votes, confidence_CJ: Floats, batch_C: np.ndarray[Any, Any], formula: str) -> Floats:
    """1 where the rewards rank the two outputs as people do, 0 where the other way, 0.5 where not at all."""
    score = np.concatenate([votes.share_CJ, 1 - votes.share_CJ])
    group = np.concatenate([np.arange(len(batch_C))] * 2)
    reward = rubric_reward(
        score, np.concatenate([confidence_CJ] * 2), np.full(score.shape, 1 / len(JUDGES)),
        np.ones(score.shape, dtype=bool), np.concatenate([batch_C] * 2), group, formula=formula,  # type: ignore[arg-type]
    )  # fmt: skip
    first, second = np.split(reward, 2)
    gap = np.nan_to_num(first - second)
    gap[np.abs(gap) < 1e-9] = 0
    return 0.5 + 0.5 * np.sign(gap) * np.where(votes.gold_C == 1, 1, -1)


def compare(votes: Votes, seed: int, draws: int) -> None:
    """Print a line per subset and way of calibration."""
    warnings.filterwarnings("ignore", message="every mean confidence")  # counted below, as not ranked
    fold = folds(votes.pair_C, FOLDS, seed)
    batch = np.array([f"{subset}/{number}" for subset, number in zip(votes.subset_C, fold, strict=True)])
    without = ranked(votes, votes.confidence_CJ, batch, "weighted")
    raw = ranked(votes, votes.confidence_CJ, batch, "grape")
    ways = {
        "by category": votes.subset_C,
        "one for both": np.full(len(fold), "both"),
    }
    columns = (
        "calibrated",
        "on",
        "groups",
        "no confidence",
        "raw",
        "calibrated",
        "calibrated - raw",
        "calibrated - none",
    )
    print(("{:14}{:10}{:>7}" + "{:>19}" * 5).format(*columns))
    for way, groups in ways.items():
        right = ranked(votes, calibrated(votes, fold, groups, seed), batch, "grape")
        for subset in ("Natural", "Neighbor", "together"):
            rows = (votes.subset_C == subset) | (subset == "together")
            measured = intervals(
                [
                    lambda w, r=rows: mean(without[r], w),
                    lambda w, r=rows: mean(raw[r], w),
                    lambda w, r=rows, c=right: mean(c[r], w),
                    lambda w, r=rows, c=right: mean(c[r] - raw[r], w),
                    lambda w, r=rows, c=right: mean(c[r] - without[r], w),
                ],
                votes.pair_C[rows], draws=draws, seed=seed,
            )  # fmt: skip
            print(("{:14}{:10}{:>7}" + "{:>19}" * 5).format(way, subset, int(rows.sum()), *map(spread, measured)))
        print(f"{'':14}ties or no reward, calibrated: {int((right == 0.5).sum())}")
    print(f"{'':14}ties without confidence: {int((without == 0.5).sum())}; raw: {int((raw == 0.5).sum())}")


def humans(path: Path, draws: int, seed: int) -> None:
    """Print how far PandaLM's labelers agree: 0 both alike, 1 the first response is better, 2 the second."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else lines(path)
    if "labels" not in rows[0]:
        labels = [[row[f"annotator{n}"] for n in (1, 2, 3)] for row in rows]
        question: Sequence[str] = [f"{row['instruction']}\0{row['input']}" for row in rows]
    else:
        labels, question = [row["labels"] for row in rows], [str(row["question"]) for row in rows]
    label = np.array(labels, dtype=np.float64)
    place = np.select([label == 1, label == 2], [1.0, 0.0], 0.5)
    nominal, graded, all_three = intervals(
        [
            lambda w: alpha(label, "nominal", w),
            lambda w: alpha(place, "interval", w),
            lambda w: mean((label == label[:, :1]).all(axis=1), w),
        ],
        question, draws=draws, seed=seed,
    )  # fmt: skip
    print(f"PandaLM: {len(label)} pairs of responses to {len(set(question))} instructions, 3 labelers")
    print(f"  alpha nominal {spread(nominal)}, interval (a tie in the middle) {spread(graded)}")
    print(f"  all three alike {spread(all_three)}")


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--pandalm", type=Path, default=EXAMPLE / "pandalm_labels.jsonl.gz")
    options = parser.parse_args()
    compare(read_votes(), options.seed, options.draws)
    print()
    humans(options.pandalm, options.draws, options.seed)


if __name__ == "__main__":
    main()
