"""The RL phase of a constitution: the preference model, and the run of `grape train` that has its reward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grape.config import PolicyConfig, RunConfig
from grape.errors import ConfigError
from grape.feedback import spread_of
from grape.lessons import read_lessons
from grape.material import Material
from grape.phases import ConstitutionRun
from grape.policy import folder_of
from grape.principles import common_judge, judges_of, write_folded
from grape.recipes import ChatDataConfig, DataConfig, RewardModelRun
from grape.records import Record
from grape.resources import read_text

SAMPLED = 256  # pairs whose values calibrate a preference model


def look_at_files(config: ConstitutionRun) -> None:
    """`ConfigError` now for what later phases would not find."""
    supervised, feedback = config.supervised, config.feedback
    if supervised and supervised.heldout and supervised.heldout.data:
        read_lessons(ChatDataConfig(path=supervised.heldout.data), "chats")
    if feedback and feedback.heldout and feedback.heldout.data:
        read_lessons(DataConfig(path=feedback.heldout.data), "pairs")
    if feedback and feedback.policy:
        folder_of(feedback.policy.model, where="feedback.policy.model")


def preference_run(config: ConstitutionRun, model: str, file: Path, **shared: Any) -> RewardModelRun:
    """The run of `grape reward-model` on the judge's labels. A pair too long for the model is left out, and said."""
    feedback, policy = config.feedback, config.policy
    assert feedback is not None, "the phase is asked for"
    own = PolicyConfig(model=model, dtype=policy.dtype, gradient_checkpointing=policy.gradient_checkpointing)
    return RewardModelRun(
        policy=feedback.policy or own,
        data=DataConfig(path=str(file), bad_rows="skip"),
        optimizer=feedback.optimizer,
        heldout=feedback.heldout,
        **shared,
    )


async def training_run(
    config: ConstitutionRun, known: Material, folder: Path, model: str, preferring: Path | None, rows: Sequence[Record],
    **update: Any,
) -> RunConfig:  # fmt: skip
    """The run of `grape train` on the constitution's rubrics, or on those that have its principles as one item.

    ``preferring`` is the preference model that learned ``rows``.
    """
    feedback, places = config.feedback, config.rubrics
    assert feedback is not None, "the phase is asked for"
    leaves = {(leaf.judge, leaf.principle is None) for plan in known.plans.values() for leaf in plan.leaves}
    asked = {name for name, other in leaves if name and (other or feedback.reward == "principles")}
    if feedback.reward != "principles":
        flow: dict[str, Any]
        if preferring:
            mean, std = await _spread(preferring, rows)
            flow = {"reward_model": str(preferring), "calibrate": {"mean": mean, "std": std}}
        else:
            flow = {"judge": feedback.judge or common_judge(known), "scale": "unit"}
            asked.add(flow["judge"])
        places = str(write_folded(known, flow, folder / "rubrics"))
    asked = judges_of(asked, known)
    update |= {
        "policy": {**config.policy.model_dump(), "model": model, **({"lora": None} if config.supervised else {})},
        "rubrics": places,
        "judges": {name: file for name, file in config.judges.items() if name in asked},
    }
    return RunConfig.model_validate({**config.model_dump(include=set(RunConfig.model_fields)), **update})


async def _spread(model: Path, rows: Sequence[Record]) -> tuple[float, float]:
    """The mean and spread of a preference model's values, computed once: they stand in the rubric to the last bit."""
    file = model.parent / "spread.json"
    if not file.is_file():
        mean, std = await spread_of(model, rows[:SAMPLED])
        try:
            draft = file.with_suffix(".draft")  # whole or not at all: a kill may come here, too
            draft.write_text(json.dumps({"mean": mean, "std": std}), encoding="utf-8")
            draft.replace(file)
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}") from error
    found = json.loads(read_text(file))
    return found["mean"], found["std"]
