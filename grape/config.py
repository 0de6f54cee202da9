"""The file of a training run, `run.yaml`: one strict model per section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from grape.errors import invalid
from grape.sections import Count, Names, NonNegative, Number, Overlap, Positive, Rate, Whole, fields_at, read_sections
from grape.types import Strict, Unit

ROLLOUT_CAP = 2.0  # where the sampler is not the trainer and nobody chose


class Lora(Strict):
    """Low-rank adapters instead of full weights."""

    r: Count = 16
    alpha: Positive | None = None
    dropout: Unit = 0.0
    targets: list[str] | None = None


class PolicyConfig(Strict):
    """The model that is trained. With ``bfloat16`` the arithmetic is in that type and the weights stay in float32.

    With ``shard`` weights, gradients and the optimizer's state are shared out among the processes (FSDP2).
    """

    model: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    lora: Lora | None = None
    gradient_checkpointing: bool = False
    shard: bool = False


class DifficultyConfig(Strict):
    """Which questions are kept, by the mean score (sum of weight x score) of the untrained policy's ``responses``."""

    low: Unit = 0.2
    high: Unit = 0.8
    responses: Count = 16

    @model_validator(mode="after")
    def _room(self) -> DifficultyConfig:
        if self.low > self.high:
            raise ValueError(".low: is above high")
        return self


class QuestionsConfig(Strict):
    """Where the questions come from, which column is which field, and their category where the rows have none.

    ``path`` is a .jsonl or .parquet file, a folder written by `datasets`, or a data set's name on the hub (with
    ``split`` and, where it has several, ``subset``). ``order`` easy-to-hard goes by the field ``difficulty`` of a row
    (a number, greater is harder), or else by what the difficulty filter measured.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    map: dict[str, str] = Field(default_factory=dict)
    category: str | None = None
    bad_rows: Literal["fail", "skip"] = "fail"
    difficulty: DifficultyConfig | None = None
    order: Literal["shuffled", "given", "easy-to-hard"] = "shuffled"


class SamplingConfig(Strict):
    """How groups of responses are drawn: ``questions`` groups a step of ``responses`` each.

    ``rounds`` above 1 is dynamic sampling: while groups of equal rewards leave fewer than ``questions`` to learn from,
    further questions are drawn, at most so many times. ``rows`` limits the responses that are decoded at a time.
    ``engine`` vllm samples with vLLM in this process, which gets the new weights after every step, and turns on
    `loss.rollout_cap`; ``options`` are vLLM's own (gpu_memory_utilization, max_model_len, ...).
    """

    questions: Count = 32
    responses: Count = 8
    max_tokens: Count = 256
    temperature: NonNegative = 1.0
    top_p: Unit = 1.0
    top_k: Whole = 0
    min_p: Unit = 0.0
    rounds: Count = 1
    rows: Count | None = None
    engine: Literal["transformers", "vllm"] = "transformers"
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _own(self) -> SamplingConfig:
        if self.options and self.engine != "vllm":
            raise ValueError(".options: are vLLM's, and go only with engine: vllm")
        return self


class ImproveConfig(Strict):
    """The improve route: responses made from a previous response and its critiques.

    ``share`` of every group, or each member with ``probability``. ``source`` is the question's last group in the log or
    the fresh members of the same step. ``context`` canonical trains on the question alone, behaviour on what was seen.
    ``baseline`` False leaves these members out of the group mean, ``negative`` False masks their negative advantages.
    ``controls`` is the share of them that sees a sibling question's critique, and again the share that sees none.
    """

    share: Unit = 0.0
    probability: Unit = 0.0
    pick: Literal["random", "best", "worst", "last"] = "random"
    source: Literal["log", "step"] = "log"
    context: Literal["canonical", "behaviour"] = "canonical"
    baseline: bool = True
    negative: bool = True
    controls: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    max_chars: Count = 8000

    @model_validator(mode="after")
    def _one_way(self) -> ImproveConfig:
        if self.share and self.probability:
            raise ValueError(".probability: share and probability exclude each other")
        return self


class SftConfig(Strict):
    """A given answer as one member of each group: the text in the question's ``field``; trained on or baseline only."""

    field: str
    use: Literal["train", "baseline"] = "train"


class TruncationConfig(Strict):
    """What becomes of a response cut at ``max_tokens``; it is judged only with ``keep``.

    mask: out of the loss, and unscorable; penalty: its reward is ``penalty``; soft: DAPO's overlong penalty, a line
    from 0 to -1 over the last ``buffer`` tokens, on every response, and -1 for one that is cut.
    """

    how: Literal["mask", "penalty", "soft", "keep"] = "mask"
    penalty: Number = 0.0
    buffer: Count | None = None


class AdvantageConfig(Strict):
    """Baseline and scale of the advantage (`grape.reward.advantage`)."""

    baseline: Literal["group_mean", "leave_one_out", "none"] = "group_mean"
    scale: Literal["none", "group_std", "batch_std"] = "none"


class LossConfig(Strict):
    """The policy loss (`grape.loss.policy_loss`), eqs. 9, 14 and 17.

    ``kl: reward`` is eq. 12; ``trpo`` is the penalty on KL(old || new) of eq. 9, without clip. ``kl_target`` makes the
    coefficient adaptive. ``rollout_cap`` turns on truncated importance weights where the tokens were not drawn from
    the policy in the context that is trained (improve members).
    """

    ratio: Literal["token", "sequence", "sequence-mean", "tapered", "none"] = "token"
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    aggregate: Literal["seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-mean"] = (
        "seq-mean-token-sum"
    )
    norm_length: Positive | None = None
    kl: Literal["none", "k2", "k3", "full", "reward", "trpo"] = "none"
    kl_coef: NonNegative = 0.0
    kl_target: Positive | None = None
    entropy_coef: NonNegative = 0.0
    rollout_cap: Positive | None = None


class ValueConfig(Strict):
    """PPO: a value head on the policy, GAE instead of the group's baseline, and the clipped value loss."""

    coef: Positive = 0.5
    clip: Positive | None = 0.2
    gamma: Unit = 1.0
    lam: Unit = 0.95
    lr: Rate | None = None


class OptimizerConfig(Strict):
    """AdamW, its schedule, and how a batch is cut into micro-batches. One update per epoch over the step's batch."""

    lr: Rate = 1e-6
    epochs: Annotated[int, Field(ge=1, le=4)] = 1
    micro_tokens: Count = 16384
    max_grad_norm: Positive = 1.0
    weight_decay: NonNegative = 0.0
    warmup: Whole = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"


class EvaluateConfig(Strict):
    """Held-out questions, sampled and scored before the first step, ``every`` so many steps, and after the last.

    Their verdicts stand in the log under the run's name with ``.heldout``. Other ``rubrics`` and ``judges`` than the
    training's make it a held-out judge. ``overlap`` says what becomes of questions of the training that are found in
    held-out ones by their 8-grams.
    """

    questions: QuestionsConfig
    every: Count = 50
    responses: Count = 1
    greedy: bool = False
    rubrics: str | None = None
    judges: dict[str, str] | None = None
    overlap: Overlap = "warn"

    @model_validator(mode="after")
    def _all(self) -> EvaluateConfig:
        if self.questions.difficulty or self.questions.order != "shuffled":
            raise ValueError(".questions: held-out questions are all asked, each time: leave out difficulty and order")
        return self


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
    checkers: Names = Field(default_factory=list)
    sampling: SamplingConfig = SamplingConfig()
    improve: ImproveConfig = ImproveConfig()
    sft: SftConfig | None = None
    truncation: TruncationConfig = TruncationConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    value: ValueConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluate: EvaluateConfig | None = None
    steps: Count = 300
    checkpoint: CheckpointConfig | None = None
    trackers: Names = Field(default_factory=list)
    log: str = "critiques.duckdb"
    seed: Whole = 0

    @model_validator(mode="before")
    @classmethod
    def _weighted(cls, data: Any) -> Any:
        """Another program's probabilities are never quite the trainer's."""
        sampling = data.get("sampling") if isinstance(data, dict) else None
        loss = data.get("loss", {}) if isinstance(data, dict) else None
        if isinstance(sampling, dict) and sampling.get("engine") == "vllm" and isinstance(loss, dict):
            return {**data, "loss": {"rollout_cap": ROLLOUT_CAP, **loss}}
        return data

    @model_validator(mode="after")
    def _together(self) -> RunConfig:
        if self.sampling.engine == "vllm" and self.policy.lora:
            raise ValueError(".sampling.engine: vllm takes whole weights, and policy.lora trains adapters")
        loss, per_sequence = self.loss, self.loss.ratio in ("sequence", "sequence-mean", "tapered")
        if loss.kl == "none" and (loss.kl_coef or loss.kl_target):
            raise ValueError(".loss.kl_coef: needs a loss.kl other than none")
        if not loss.kl_coef and (loss.kl in ("reward", "trpo") or loss.kl_target):  # the others measure
            raise ValueError(f".loss.kl_coef: loss.kl {loss.kl} needs one above 0")
        if loss.kl == "trpo" and loss.ratio != "token":
            raise ValueError(".loss.kl: trpo goes with ratio token")
        if loss.dual_clip and (loss.ratio in ("tapered", "none") or loss.kl == "trpo"):
            raise ValueError(".loss.dual_clip: needs a clip, which ratio tapered, ratio none and kl trpo have not")
        if loss.aggregate == "seq-mean-token-sum-norm" and loss.norm_length is None:
            raise ValueError(".loss.norm_length: aggregate seq-mean-token-sum-norm needs it")
        if self.value and per_sequence:
            raise ValueError(f".value: has an advantage per token, ratio {loss.ratio} takes one per sequence")
        if self.value and (self.advantage.baseline != "none" or self.advantage.scale != "none"):
            raise ValueError(".value: the value head is the baseline: set advantage.baseline to none and no scale")
        if self.truncation.how == "soft" and not 0 < (self.truncation.buffer or 0) <= self.sampling.max_tokens:
            raise ValueError(".truncation.buffer: how: soft needs it, and it is at most sampling.max_tokens")
        return self


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run of a file, with ``section.field=value`` overrides (values are YAML)."""
    return parse_run(*read_sections(path, overrides))


def parse_run(data: Any, source: str) -> RunConfig:
    """A run from plain data. What is wrong is a `ConfigError` of one line."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise invalid(source, error, fields_at(error, RunConfig)) from error
