"""The runs that test_tuning_parity.py compares: rows, what both sides are told of them, and what must be noticed.

Words are spelled backwards, in the vocabulary of the quickstart's policy. What tampers with a trainer of TRL is here too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from math import cos, pi
from typing import Any

MARKED = (  # the template of the quickstart's policy, with marks around what is the assistant's
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DOTTED = MARKED.replace("{% endif %}{% endfor %}", "{% endif %}.{% endfor %}")  # as ChatML has a newline after each end
WORDS = ("ab", "cat", "d", "eefgg", "house", "it", "jumping", "kn", "longest", "m")
GOOD = (True, True, False, True, True, True, True, False, True, True)
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run in both sides' words: the sections of our file and its rows, TRL's trainer and its options.

    ``batch`` are TRL's rows a step, ``template`` the tokenizer's, ``logged`` our names of what both log and TRL's.
    """

    verb: str
    rows: str
    ours: dict[str, dict[str, Any]] = field(default_factory=dict)
    trainer: str
    theirs: dict[str, Any] = field(default_factory=dict)
    batch: int = 4
    template: str | None = MARKED
    logged: dict[str, str] = field(default_factory=dict)


def said(role: str, text: str) -> dict[str, str]:
    """A turn of a chat."""
    return {"role": role, "content": text}


@cache
def rows_of(name: str) -> Rows:
    """The rows of a file: chats of one turn or more, one with a system message, one with an empty rejected response."""
    asked = [[said("user", f"Spell backwards: {word}")] for word in WORDS]
    asked[2].insert(0, said("system", "Sure! "))
    asked[5][:0] = [said("user", "Ugh. "), said("assistant", "Sure! ")]
    right = [f"It is {word[::-1]}." for word in WORDS]
    wrong = ["" if n == 3 else f"Maybe it is {word[: n % 4]}." for n, word in enumerate(WORDS)]
    pairs = [
        {"question": question, "chosen": word, "rejected": other}
        for question, word, other in zip(asked, right, wrong, strict=True)
    ]
    kinds: dict[str, Rows] = {
        "pairs": pairs,
        "plain pairs": [{**row, "question": f"Sort the letters: {word}"} for row, word in zip(pairs, WORDS, strict=True)],
        "margins": [{**row, "margin": n / 4} for n, row in enumerate(pairs)],
        "several": [row for one in pairs for row in (one, {**one, "rejected": "I give up." + one["chosen"]})],
        "responses": [{"question": row["question"], "response": row["chosen"]} for row in pairs],
        "plain responses": [{"question": f"Sort the letters: {word}", "response": word[::-1]} for word in WORDS],
        "chats": [
            {"messages": [*row["question"], said("assistant", row["chosen"]), said("user", f"Ugh. {word}"),
                          said("assistant", "I give up.")]}
            for row, word in zip(pairs, WORDS, strict=True)
        ],
        "labels": [
            {"question": row["question"], "response": row["chosen" if good else "rejected"], "label": good}
            for row, good in zip(pairs, GOOD, strict=True)
        ],
    }  # fmt: skip
    return kinds[name]


def for_trl(row: dict[str, Any], case: Case) -> dict[str, Any]:
    """A row as TRL takes it."""
    if "messages" in row:
        chat = row["messages"]
        return row if case.theirs.get("assistant_only_loss") else {"prompt": chat[:-1], "completion": chat[-1:]}
    names = {"question": "prompt", "response": "completion"}
    told = {names.get(name, name): value for name, value in row.items()}
    if case.template:
        told |= {name: [said("assistant", told[name])] for name in {"completion", "chosen", "rejected"} & told.keys()}
    return told


def asked(row: dict[str, Any]) -> list[dict[str, str]]:
    """What stands before the response of a row, or a chat as a whole."""
    question = row["messages"] if "messages" in row else row["question"]
    return [said("user", question)] if isinstance(question, str) else question


def mismatched(made: Any) -> None:
    """KTO's other rows as ours has them: each question with the response to the next other one."""
    rows = [made.train_dataset[at] for at in range(len(made.train_dataset))]
    others = [
        next(
            other["completion_ids"]
            for other in (rows[at + 1 :] + rows[:at])
            if other["prompt_ids"] != row["prompt_ids"]
        )
        for at, row in enumerate(rows)
    ]
    made.train_dataset = made.train_dataset.remove_columns("KL_completion_ids").add_column("KL_completion_ids", others)


def by_the_paper(made: Any) -> None:
    """ORPO's first term as in its eq. 6: the mean over pairs of the loss per token of the chosen response."""
    forward = made.concatenated_forward

    def concatenated(*given: Any) -> tuple[Any, ...]:
        chosen, *others = forward(*given)
        return chosen, *others[:-1], -chosen.mean()

    made.concatenated_forward = concatenated


def endless(made: Any) -> None:
    """Responses whose end is not learned, and is not read."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        shorter = {at: row[at][:-1] for at in ("chosen_ids", "rejected_ids", "completion_ids") if at in row}
        return shorter | ({"labels": [*row["labels"][:-1], -100]} if "labels" in row else {})

    made.train_dataset = made.train_dataset.map(cut)


def unmasked(made: Any) -> None:
    """Pairs whose prompts are learned too."""
    sides = ("chosen", "rejected")
    made.train_dataset = made.train_dataset.map(lambda row: {f"{at}_labels": row[f"{at}_input_ids"] for at in sides})


def rising(then: Callable[[float], float], done: int) -> float:
    """Our warmup over 2 of 6 steps, as a share of the rate after so many steps."""
    return (done + 1) / 2 if done < 2 else then((done - 2) / 4)


REWARDS = {
    f"rewards/{ours}": f"rewards/{there}"
    for ours, there in (("chosen", "chosen"), ("rejected", "rejected"), ("margin", "margins"))
}
LOGPS = {"logps/chosen": "logps/chosen", "logps/rejected": "logps/rejected"}
ACCURACY = {"rewards/accuracy": "rewards/accuracies"}
SCORES = {"accuracy": "accuracy", "reward/mean": "mean_reward"}
SFT = partial(Case, verb="sft", rows="responses", trainer="sft", logged={"nll": "loss"})
MODEL = partial(Case, verb="reward-model", rows="pairs", trainer="reward", logged=SCORES)
DPO = partial(Case, verb="dpo", rows="pairs", trainer="dpo", logged=REWARDS | LOGPS)
CPO = partial(Case, verb="dpo", rows="pairs", trainer="cpo", logged=REWARDS | ACCURACY)
KTO = partial(Case, verb="dpo", rows="labels", trainer="kto", logged=REWARDS | LOGPS | {"kl": "kl"})
CASES = {
    "sft": SFT(),
    "sft, no template": SFT(rows="plain responses", template=None),
    "sft, last turn": SFT(rows="chats"),
    "sft, all turns": SFT(
        rows="chats",
        ours={"data": {"turns": "all"}, "optimizer": {"batch": 21, "epochs": 4}},
        theirs={"assistant_only_loss": True},
        batch=10,
    ),
    "sft, accumulated": SFT(theirs={"micro": 2}),
    "sft, linear, decay": SFT(
        ours={"optimizer": {"schedule": "linear", "weight_decay": 1.0}},
        theirs={"lr_scheduler_type": "linear", "weight_decay": 1.0},
    ),
    "sft, cosine, clipped": SFT(
        ours={"optimizer": {"schedule": "cosine", "max_grad_norm": 2.0}},
        theirs={"lr_scheduler_type": "cosine", "max_grad_norm": 2.0},
    ),
    "sft, linear, warmup": SFT(
        ours={"optimizer": {"schedule": "linear", "warmup": 2}}, theirs={"rates": partial(rising, lambda x: 1 - x)}
    ),
    "sft, cosine, warmup": SFT(
        ours={"optimizer": {"schedule": "cosine", "warmup": 2}},
        theirs={"rates": partial(rising, lambda x: (1 + cos(pi * x)) / 2)},
    ),
    "bradley-terry": MODEL(),
    "bradley-terry, margins": MODEL(rows="margins", ours={"loss": {"margin": True}}),
    "bradley-terry, two pairs a question": MODEL(rows="several", batch=8, logged={"accuracy": "accuracy"}),
    "dpo": DPO(ours={"loss": {"beta": 0.1}}, theirs={"beta": 0.1}),
    "dpo, no template": DPO(
        rows="plain pairs", template=None, ours={"loss": {"beta": 0.3}}, theirs={"beta": 0.3, "micro": 2}
    ),
    "cdpo": DPO(
        ours={"loss": {"kind": "cdpo", "beta": 0.2, "smoothing": 0.1}},
        theirs={"loss_type": ["aot"], "beta": 0.2, "label_smoothing": 0.1, "micro": 1},
    ),
    "ipo": DPO(ours={"loss": {"kind": "ipo", "beta": 1.0}}, theirs={"loss_type": ["ipo"], "beta": 1.0}, logged=LOGPS),
    "simpo": CPO(
        ours={"loss": {"kind": "simpo", "beta": 2.0, "gamma": 1.6}},
        theirs={"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.6, "cpo_alpha": 0.0},
    ),
    "orpo": CPO(
        ours={"loss": {"kind": "orpo", "beta": 0.3}},
        trainer="orpo",
        theirs={"beta": 0.3, "on_made": by_the_paper},
        logged=REWARDS | ACCURACY | {"nll": "nll_loss"},
    ),
    "kto": KTO(ours={"loss": {"kind": "kto", "beta": 0.1}}, theirs={"beta": 0.1, "on_made": mismatched}),
    "kto, weights": KTO(
        ours={"loss": {"kind": "kto", "beta": 0.5, "desirable_weight": 0.75, "undesirable_weight": 1.25}},
        theirs={"beta": 0.5, "desirable_weight": 0.75, "undesirable_weight": 1.25, "on_made": mismatched},
    ),
}
WRONG = [
    ("sft", "loss.aggregate=seq-mean-token-mean"),
    ("sft", "optimizer.lr=1.05e-4"),
    ("sft", "seed=1"),
    ("sft, all turns", "data.turns=last"),
    ("sft, linear, decay", "optimizer.weight_decay=0.95"),
    ("sft, linear, decay", "optimizer.schedule=cosine"),
    ("sft, cosine, clipped", "optimizer.max_grad_norm=2.1"),
    ("sft, cosine, clipped", "optimizer.schedule=linear"),
    ("sft, linear, warmup", "optimizer.warmup=1"),
    ("bradley-terry, margins", "loss.margin=false"),
    ("bradley-terry, two pairs a question", "data.limit=19"),
    ("dpo", "loss.beta=0.105"),
    ("dpo", "loss={kind: cdpo, beta: 0.1, smoothing: 0.05}"),
    ("cdpo", "loss.smoothing=0"),
    ("cdpo", "loss.smoothing=0.105"),
    ("cdpo", "loss.beta=0.21"),
    ("ipo", "loss.beta=1.05"),
    ("simpo", "loss.beta=2.1"),
    ("simpo", "loss.gamma=0"),
    ("simpo", "loss.gamma=1.68"),
    ("orpo", "loss.beta=0.315"),
    ("kto", "loss.beta=0.105"),
    ("kto, weights", "loss.desirable_weight=0.7875"),
    ("kto, weights", "loss.undesirable_weight=1.0"),
]

WRONG_THERE = {
    "the prompt is learned": ("sft", {"completion_only_loss": False}),
    "the end is not learned": ("sft", {"on_made": endless}),
    "another beta of Adam": ("sft", {"adam_beta2": 0.99}),
    "another epsilon of Adam": ("sft", {"adam_epsilon": 1e-5}),
    "the value is read before the end": ("bradley-terry", {"on_made": endless}),
    "large values cost": ("bradley-terry", {"center_rewards_coefficient": 1e-3}),
    "no reference": ("dpo", {"trainer": "cpo", "loss_type": "sigmoid", "cpo_alpha": 0.0}),
    "a reference that follows": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "ends are not compared": ("dpo", {"on_made": endless}),
    "smoothing as robust DPO has it": ("cdpo", {"loss_type": ["robust"]}),
    "a sum in place of a mean": ("simpo", {"loss_type": "sigmoid"}),
    "a term of SFT": ("simpo", {"cpo_alpha": 0.1}),
    "prompts are compared": ("simpo", {"on_made": unmasked}),
    "no KL": ("kto", {"loss_type": "apo_zero_unpaired", "on_made": None}),
    "a KL of other rows": ("kto", {"on_made": None}),
}
