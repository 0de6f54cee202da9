"""What `grape sft`, `grape reward-model` and `grape dpo` learn: the tasks, each with its rows and its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from grape.chat import answer_ids, chat_ids, prompt_ids
from grape.classifier import STEPS
from grape.config import PolicyConfig
from grape.errors import ConfigError
from grape.examples import Example, Totals, in_order
from grape.head import token_logprobs
from grape.lessons import Lesson
from grape.logprobs import scattered
from grape.loss import Metrics
from grape.member import Batch
from grape.policy import Policy, logits
from grape.preference import (
    bradley_terry_loss,
    kto_loss,
    outcome_loss,
    preference_loss,
    ranking_loss,
    sft_loss,
    step_loss,
)
from grape.recipes import DpoRun, RewardModelRun, SftRun
from grape.types import Message, Question


class Likelihood:
    """What tasks on a policy share: the prompts' tokens, and the responses' log-probabilities."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def rows(self, lesson: Lesson) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """The prompt as `grape train` would sample from it, and each response with its end."""
        tokenizer = self._policy.tokenizer
        question = Question(question_id=lesson.place, category="", text=lesson.prompt)
        asked = tuple(prompt_ids(tokenizer, question))
        return tuple((asked, answer_ids(tokenizer, text, lesson.place)) for text in lesson.responses)

    def logprobs(self, batch: Batch) -> Tensor:
        """Log-probabilities B x T of the responses' tokens."""
        states_NH = batch.text.states(self._policy.model)
        logprobs_N, _, _ = token_logprobs(partial(logits, self._policy.model), states_NH, batch.labels_N)
        return scattered(logprobs_N, batch.mask_BT)

    def begin(self, estimate: float) -> None:
        """Nothing is estimated."""

    def sums(self, examples: Sequence[Example], batch: Batch) -> Tensor:
        """The summed log-probability of each member, in the examples' order."""
        return in_order(self.logprobs(batch).double().sum(1), examples, batch)


class Sft(Likelihood):
    """Supervised fine-tuning."""

    reference = False

    def __init__(self, policy: Policy, config: SftRun) -> None:
        super().__init__(policy)
        self._config = config.loss

    def loss(self, examples: Sequence[Example], batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        """The negative log-likelihood; its mean over tokens is the metric ``nll``."""
        logprobs_BT = self.logprobs(batch)
        counts = {"num_sequences": totals.examples, "num_tokens": totals.tokens}
        loss = sft_loss(logprobs_BT, batch.mask_BT, aggregate=self._config.aggregate, **counts)
        return loss, {"nll": -logprobs_BT.detach().sum() / totals.tokens}


class Alignment(Likelihood):
    """Direct alignment on pairs."""

    def __init__(self, policy: Policy, config: DpoRun) -> None:
        super().__init__(policy)
        self._config = config.loss
        self.reference = config.loss.kind in ("dpo", "cdpo", "ipo")

    def loss(self, examples: Sequence[Example], batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        """`preference_loss`, its metrics with it."""
        kind = self._config.kind
        chosen_P, rejected_P = self.sums(examples, batch).view(-1, 2).unbind(1)
        options: dict[str, Any] = {}
        if self.reference:
            ref_P2 = torch.tensor([one.ref for one in examples], dtype=torch.float64, device=chosen_P.device)
            options |= {"ref_chosen_P": ref_P2[:, 0], "ref_rejected_P": ref_P2[:, 1]}
        if kind in ("ipo", "simpo", "orpo"):
            lengths_P2 = torch.tensor(
                [[len(row.token_ids) for row in one.members] for one in examples], device=chosen_P.device
            )
            options |= {"chosen_tokens_P": lengths_P2[:, 0], "rejected_tokens_P": lengths_P2[:, 1]}
        if kind == "dpo":
            labels = [one.lesson.pairs[0].probability for one in examples]
            options["probability_P"] = torch.tensor(labels, dtype=torch.float64, device=chosen_P.device)
        options |= {"smoothing": self._config.smoothing} if kind == "cdpo" else {}
        options |= {"gamma": self._config.gamma} if kind == "simpo" else {}
        loss_P, metrics = preference_loss(kind, chosen_P, rejected_P, beta=self._config.beta, **options)  # type: ignore[arg-type]
        share = len(examples) / totals.examples
        return loss_P.sum() / totals.examples, {name: share * value for name, value in metrics.items()}


class Unpaired(Likelihood):
    """KTO: responses that are wanted or not; how far the policy is from the reference is told by mismatched rows."""

    reference = True

    def __init__(self, policy: Policy, config: DpoRun) -> None:
        super().__init__(policy)
        self._config = config.loss
        self._kl = 0.0

    def begin(self, estimate: float) -> None:
        """The KL of this batch."""
        self._kl = estimate

    def loss(self, examples: Sequence[Example], batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        """`kto_loss`, its metrics with it."""
        logprobs_B = self.sums(examples, batch)
        ref_B = torch.tensor([one.ref[0] for one in examples], dtype=torch.float64, device=logprobs_B.device)
        wanted_B = torch.tensor([bool(one.lesson.label) for one in examples], device=logprobs_B.device)
        weights = {name: getattr(self._config, name) for name in ("beta", "desirable_weight", "undesirable_weight")}
        loss_B, metrics = kto_loss(logprobs_B, ref_B, wanted_B, self._kl, **weights)
        wanted = int(wanted_B.sum())
        shares = {
            "chosen": wanted / max(1, totals.wanted),
            "rejected": (len(examples) - wanted) / max(1, totals.examples - totals.wanted),
        }
        metrics.pop("rewards/margin", None)  # a difference of the whole batch's means
        told = {
            name: shares.get(name.rpartition("/")[2], len(examples) / totals.examples) * value
            for name, value in metrics.items()
        }
        return loss_B.sum() / totals.examples, told


class Reward:
    """A reward model: its value is read at the end of the whole chat, as `reward_model:` items read it."""

    reference = False

    def __init__(self, policy: Policy, config: RewardModelRun) -> None:
        self._policy = policy
        self._config = config.loss

    def rows(self, lesson: Lesson) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """What the chats have in common, and the rest of each; a last token stands in for the one after its end."""
        chats = [self._chat(lesson, text) for text in lesson.responses]
        least = min(map(len, chats)) - 1
        same = next((at for at in range(least) if len({ids[at] for ids in chats}) > 1), least)
        if least < 1:
            raise ConfigError(f"{lesson.place}: a chat of one token has no response")
        alone = self._asked(lesson) if len(chats) == 1 else same
        cut = max(1, min(alone, least))
        return tuple((tuple(ids[:cut]), (*ids[cut:], self._policy.pad_id)) for ids in chats)

    def begin(self, estimate: float) -> None:
        """Nothing is estimated."""

    def _chat(self, lesson: Lesson, text: str) -> list[int]:
        answer: Message = {"role": "assistant", "content": text}
        return chat_ids(self._policy.tokenizer, [*lesson.prompt, answer], lesson.place, complete=True)

    def _asked(self, lesson: Lesson) -> int:
        """How many tokens stand before the response, where there is but one."""
        return len(
            prompt_ids(self._policy.tokenizer, Question(question_id=lesson.place, category="", text=lesson.prompt))
        )

    def loss(self, examples: Sequence[Example], batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        """The loss of each question, a mean over its pairs; the accuracy is that of its pairs, ties counting half."""
        states_NH = batch.text.states(self._policy.model)
        values_N = self._policy.model.score(states_NH).squeeze(-1).float()
        values_BT = scattered(values_N, batch.mask_BT)
        last_B = batch.mask_BT.sum(1) - 1
        value_B = values_BT.gather(1, last_B[:, None]).squeeze(1)
        flat = torch.split(in_order(value_B, examples, batch), [len(one.members) for one in examples])
        if self._config.kind == "outcome":
            return self._outcome(examples, values_BT, flat, batch, totals)
        losses, right = [], 0.0
        for one, scores_K in zip(examples, flat, strict=True):
            if self._config.kind == "ranking":
                losses.append(ranking_loss(scores_K))
                better = [(k, j) for k in range(len(scores_K)) for j in range(k + 1, len(scores_K))]
            else:
                better = [(pair.better, pair.worse) for pair in one.lesson.pairs]
                losses.append(self._pairs(one.lesson, scores_K))
            gaps = torch.stack([scores_K[k] - scores_K[j] for k, j in better]).detach()
            right += float(((gaps > 0).double() + 0.5 * (gaps == 0)).mean())
        loss = torch.stack(losses).sum() / totals.examples
        return loss, {
            "accuracy": torch.tensor(right / totals.examples),
            "reward/mean": torch.stack([scores.detach().mean() for scores in flat]).sum() / totals.examples,
        }

    def _pairs(self, lesson: Lesson, scores_K: Tensor) -> Tensor:
        better, worse = ([getattr(pair, side) for pair in lesson.pairs] for side in ("better", "worse"))
        margin = torch.tensor([pair.margin for pair in lesson.pairs], device=scores_K.device)
        label = torch.tensor([pair.probability for pair in lesson.pairs], device=scores_K.device)
        given: Mapping[str, Tensor] = {"margin_P": margin} if self._config.margin else {}
        return bradley_terry_loss(scores_K[better], scores_K[worse], probability_P=label, **given).mean()

    def _outcome(
        self, examples: Sequence[Example], values_BT: Tensor, flat: Sequence[Tensor], batch: Batch, totals: Totals
    ) -> tuple[Tensor, Metrics]:
        """Every token of a response is labelled with whether it was right; the accuracy is that of its last token."""
        label = {one.members[0].response_id: float(bool(one.lesson.label)) for one in examples}
        correct_B1 = torch.tensor([[label[one.response_id]] for one in batch.members], device=values_BT.device)
        own_BT = batch.mask_BT[:, 1:]  # the first value of a row is that of the prompt's last token
        labels_N = correct_B1.expand(own_BT.shape)[own_BT]
        loss = outcome_loss(values_BT[:, 1:][own_BT], labels_N).sum() / (totals.tokens - totals.examples)
        ends = [score for scores in flat for score in scores.detach().tolist()]
        right = sum(
            0.5 if end == 0 else float((end > 0) == bool(one.lesson.label))
            for one, end in zip(examples, ends, strict=True)
        )
        return loss, {"accuracy": torch.tensor(right / totals.examples)}


class Process:
    """A process reward model: where a step ends, three logits say whether it is wrong, neutral or right."""

    reference = False

    def __init__(self, policy: Policy, config: RewardModelRun) -> None:
        self._policy = policy

    def rows(self, lesson: Lesson) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """The prompt and all steps, each as tokens of its own; a last token stands in for the one after their end."""
        question = Question(question_id=lesson.place, category="", text=lesson.prompt)
        asked = tuple(prompt_ids(self._policy.tokenizer, question))
        return ((asked, (*(token for step in self._steps(lesson) for token in step), self._policy.pad_id)),)

    def begin(self, estimate: float) -> None:
        """Nothing is estimated."""

    def _steps(self, lesson: Lesson) -> list[tuple[int, ...]]:
        steps = [answer_ids(self._policy.tokenizer, text, lesson.place)[:-1] for text in lesson.steps]
        if () in steps:
            raise ConfigError(f"{lesson.place}: steps.{steps.index(())}: has no tokens")
        return steps

    def loss(self, examples: Sequence[Example], batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        """The mean over all steps; beside the accuracy, the shares of the labels: what a constant would come to."""
        lessons = {one.members[0].response_id: one.lesson for one in examples}
        ends_BT, labels = torch.zeros_like(batch.mask_BT), list[int]()
        for row, one in enumerate(batch.members):
            lesson = lessons[one.response_id]
            ends_BT[row, list(accumulate(map(len, self._steps(lesson))))] = True  # 0 is the prompt's last token
            labels += lesson.labels
        states_NH = batch.text.states(self._policy.model)
        logits_M3 = self._policy.model.score(states_NH[ends_BT[batch.mask_BT]])
        label_M = torch.tensor(labels, device=logits_M3.device)
        right_M = logits_M3.argmax(1) - 1 == label_M
        shares = {f"labels/{name}": (label_M == at - 1).sum() / totals.steps for at, name in enumerate(STEPS)}
        loss = step_loss(logits_M3, label_M).sum() / totals.steps
        return loss, {"accuracy": right_M.sum() / totals.steps, **shares}


def autocast(config: PolicyConfig, device: Any) -> Any:
    """Arithmetic in bfloat16, where the config says so; the weights stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")
