"""The file of a training run, `run.yaml`: one strict model per section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from grape.types import Strict, Unit

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Lora(Strict):
    """Low-rank adapters instead of full weights."""

    r: Count = 16
    alpha: Positive | None = None
    dropout: Unit = 0.0
    targets: list[str] | None = None


class PolicyConfig(Strict):
    """The model that is trained."""

    model: str
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    lora: Lora | None = None


class QuestionsConfig(Strict):
    """Where the questions come from, which column is which field, and their category where the rows have none."""

    path: str
    map: dict[str, str] = Field(default_factory=dict)
    category: str | None = None


class SamplingConfig(Strict):
    """How groups of responses are drawn: ``questions`` groups a step of ``responses`` each."""

    questions: Count = 32
    responses: Count = 8
    max_tokens: Count = 256
    temperature: Positive = 1.0


class ImproveConfig(Strict):
    """The improve route: the share of a group made from a previous response and its critiques."""

    share: Unit = 0.0
    pick: Literal["random", "best", "worst", "last"] = "random"
    context: Literal["canonical", "behaviour"] = "canonical"


class AdvantageConfig(Strict):
    """Baseline and scale of the advantage (`grape.reward.advantage`)."""

    baseline: Literal["group_mean", "leave_one_out", "none"] = "group_mean"
    scale: Literal["none", "group_std", "batch_std"] = "none"


class LossConfig(Strict):
    """The clipped policy loss, eqs. 14 and 17."""

    ratio: Literal["token", "sequence", "sequence-mean", "tapered", "none"] = "token"
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2
    aggregate: Literal["seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-mean"] = (
        "seq-mean-token-sum"
    )
    kl: Literal["none", "k2", "k3", "full", "reward"] = "none"
    kl_coef: NonNegative = 0.0


class OptimizerConfig(Strict):
    """AdamW, and how a batch is cut into micro-batches."""

    lr: Positive = 1e-6
    epochs: Annotated[int, Field(ge=1, le=4)] = 1
    micro_tokens: Count = 16384
    max_grad_norm: Positive = 1.0


class CheckpointConfig(Strict):
    """Where and how often the state is saved, and how many saves are kept."""

    dir: str
    every: Count = 50
    keep: Count = 2


class RunConfig(Strict):
    """A training run."""

    policy: PolicyConfig
    questions: QuestionsConfig
    rubrics: str | None = None
    judges: dict[str, str] = Field(default_factory=dict)
    sampling: SamplingConfig = SamplingConfig()
    improve: ImproveConfig = ImproveConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: Count = 300
    checkpoint: CheckpointConfig | None = None
    log: str = "critiques.duckdb"
    seed: int = 0


Kind = Literal["rubric", "judge", "run"]


def schema(kind: Kind) -> dict[str, Any]:
    """The JSON Schema of a file, by which editors complete and check it."""
    from grape.judge.config import Judge
    from grape.rubric import Rubric

    models: dict[str, type[BaseModel]] = {"rubric": Rubric, "judge": Judge, "run": RunConfig}
    if kind not in models:
        raise ValueError(f"kind must be rubric, judge or run, not {kind!r}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"grape {kind}",
        **{key: value for key, value in models[kind].model_json_schema(by_alias=True).items() if key != "title"},
    }
