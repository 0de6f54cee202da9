"""The file of `grape constitution`: that of `grape train`, with a supervised phase and where rewards come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from grape.config import CheckpointConfig, PolicyConfig, RunConfig
from grape.errors import invalid
from grape.recipes import ChatDataConfig, HeldoutConfig, LessonsConfig, NllConfig
from grape.sections import Count, Whole, fields_at, read_sections
from grape.types import Name, Strict

POLICY = "policy"  # who criticises and revises, where it is no judge


class SupervisedConfig(Strict):
    """Critique and revision, and SFT on what came of it (Bai et al. 2022, section 3).

    Each question with principles gets ``responses`` chains of ``rounds`` revisions, each by a principle drawn at
    random. ``critic`` and ``reviser`` are the policy itself or a judge's name. With ``score`` every response of the
    chains is judged by the constitution too. SFT sees the last revisions, ``helpful`` of the policy's own responses to
    each question without principles, and the rows of ``mix``.
    """

    rounds: Count = 4
    responses: Count = 1
    critic: Name = POLICY
    reviser: Name = POLICY
    score: bool = False
    helpful: Whole = 1
    mix: ChatDataConfig | None = None
    loss: NllConfig = NllConfig()
    optimizer: LessonsConfig = LessonsConfig()
    heldout: HeldoutConfig | None = None


class FeedbackConfig(Strict):
    """Where the reward of the RL phase comes from: from the same principles, in one of three ways.

    principles: each is an item, as in any rubric. judge: one item asks the ``judge`` about all of them at once.
    preferences: the judge compares ``pairs`` of responses to each question by a principle drawn at random, in both
    orders; a reward model learns from its soft labels, none surer than ``clamp``, and is the item. ``policy`` is what
    that model is made of, by default the policy after the supervised phase.
    """

    reward: Literal["preferences", "judge", "principles"] = "preferences"
    judge: Name | None = None
    pairs: Count = 1
    clamp: Annotated[float, Field(gt=0.5, le=1)] = 1.0
    policy: PolicyConfig | None = None
    optimizer: LessonsConfig = LessonsConfig()
    heldout: HeldoutConfig | None = None

    @model_validator(mode="after")
    def _own(self) -> FeedbackConfig:
        apart = {"preferences": set(), "judge": {"pairs", "clamp", "policy", "optimizer", "heldout"}}
        apart["principles"] = apart["judge"] | {"judge"}
        if strange := sorted(self.model_fields_set & apart[self.reward]):
            raise ValueError(f".{strange[0]}: does not go with reward: {self.reward}")
        return self


class ConstitutionRun(RunConfig):
    """The two phases of Constitutional AI; all other sections are those of `grape train`, for the second one.

    ``checkpoint.dir`` gets the results of every phase.
    """

    supervised: SupervisedConfig | None = SupervisedConfig()
    feedback: FeedbackConfig | None = FeedbackConfig()
    checkpoint: CheckpointConfig

    @model_validator(mode="after")
    def _phases(self) -> ConstitutionRun:
        feedback = self.feedback
        if self.supervised is None and feedback is None:
            raise ValueError(".feedback: neither supervised nor feedback is there, and nothing to do")
        if self.policy.lora and feedback and feedback.reward == "preferences" and feedback.policy is None:
            raise ValueError(".feedback.policy: with policy.lora it is needed: a reward model is trained whole")
        if feedback and feedback.policy and feedback.policy.lora:
            raise ValueError(".feedback.policy.lora: a reward model is trained whole")
        if feedback and feedback.policy and feedback.policy.shard:
            raise ValueError(".feedback.policy.shard: is for grape train")
        return self

    @property
    def asked(self) -> set[str]:
        """The judges that the phases ask themselves."""
        names = {self.supervised.critic, self.supervised.reviser} if self.supervised else set()
        return (names - {POLICY}) | ({self.feedback.judge} if self.feedback and self.feedback.judge else set())


def load_phases(path: str | Path, overrides: Sequence[str] = ()) -> ConstitutionRun:
    """The run of a file, with ``section.field=value`` overrides (values are YAML); `ConfigError` of one line."""
    data, source = read_sections(path, overrides)
    try:
        return ConstitutionRun.model_validate(data)
    except ValidationError as error:
        raise invalid(source, error, fields_at(error, ConstitutionRun)) from error
