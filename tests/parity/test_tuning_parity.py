"""`grape sft`, `reward-model` and `dpo` against the trainers of TRL 1.16.0: whole runs, step by step, in float32.

Ours is `tune` on a file, its numbers are those of the log and its weights those of the last checkpoint. TRL gets the
same rows in its own form, renders, tokenizes and masks them by itself, and takes them in the order that ours took.
`CASES` (tuning_cases.py) has the file's settings and TRL's beside them: 10 rows, batches of 4 and a rest, two epochs.
The rate is low and the seed chosen, as Adam divides by a gradient's size, also where that is float32's rounding: at
1e-3 a weight or two of the 23,000 differ by more than 1e-5 in every fifth run.

TRL has no rankings, no soft labels, no outcome model of single responses and no means over sequences; its PRM trainer
is gone. Not the same, by definition, and tested as such at the end:

- Warmup: TRL's first step has a rate of 0 and moves nothing, ours has 1/warmup.
- What a template writes after the end of a turn (a newline in ChatML) is taught by TRL, and never by ours.
- A question's pairs: TRL's mean is over all pairs of a batch, ours over questions (Ouyang et al. 2022, eq. 1).
- ORPO's first term: TRL has one mean over the tokens of prompts and chosen responses, ours each response's own mean.
- cDPO is no loss of DPOTrainer but for `aot` with micro-batches of one pair.
- KTO's KL: TRL shifts the responses of a micro-batch by one, whatever the questions are, and cuts each micro-batch's at
  0; ours goes by the whole batch, and pairs a question with a response to another one.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_classifier, tiny_model
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from tuning_cases import (
    CASES,
    DOTTED,
    KTO,
    MARKED,
    MODEL,
    SFT,
    WORDS,
    WRONG,
    WRONG_THERE,
    Case,
    Rows,
    asked,
    for_trl,
    rows_of,
    said,
)

from grape.examples import Example
from grape.policy import load_policy
from grape.recipes import DpoRun, RewardModelRun, SftRun, load_recipe
from grape.teacher import Teacher
from grape.tuning import tune

pytestmark = pytest.mark.parity

LOSS, NORM, WEIGHT, METRIC = 1e-6, 1e-5, 1e-5, 1e-5  # absolute, relative, absolute, absolute
ROOT = Path(__file__).parent.parent.parent
LR = 1e-4
SEED = 12
RUNS = {"sft": SftRun, "reward-model": RewardModelRun, "dpo": DpoRun}
SHAPE = {
    "vocab_size": 42,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What our run did, by optimizer step, and the examples that each step took."""

    losses: list[float]
    grad_norms: list[float]
    metrics: list[dict[str, float]] = field(repr=False)
    states: dict[int, dict[str, torch.Tensor]] = field(repr=False)  # the weights of each checkpoint, by its step
    taken: list[list[Example]] = field(repr=False)


@cache
def folder(verb: str, template: str | None = MARKED) -> str:
    """The model that both sides begin with, and its tokenizer."""
    where = tempfile.mkdtemp(prefix="parity-")
    atexit.register(shutil.rmtree, where)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/quickstart/policy")
    if verb == "reward-model":
        tiny_classifier(Path(where), seed=SEED, **SHAPE)
    else:
        model = tiny_model(seed=SEED, **SHAPE)
        learn_a_little(model, tokenizer)
        model.save_pretrained(where)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(where)
    return where


def learn_a_little(model: Any, tokenizer: Any) -> None:
    """Towards a loss of about 1: at 4 the sum over a batch's tokens has no float32 that is right to 1e-6."""
    texts = [f"<|user|>Spell backwards: {word}<|end|><|assistant|>It is {word[::-1]}.<|end|>" for word in WORDS]
    given = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        adamw.zero_grad()
        model(**given, labels=labels).loss.backward()
        adamw.step()


def by_us(case: Case, *changed: str, rows: Rows | None = None) -> Trained:
    """A run of ours, from its file to its checkpoint."""
    taken: list[list[Example]] = []

    class Watched(Teacher):
        def update(self, step: int) -> dict[str, float]:
            taken.append(self.batch(step))
            return super().update(step)

    sections: dict[str, dict[str, Any]] = {
        "policy": {"model": folder(case.verb, case.template), "dtype": "float32"},
        "data": {"path": "rows.jsonl"},
        "optimizer": {"lr": LR, "batch": 4, "epochs": 2, "micro_tokens": 90},
        "checkpoint": {"dir": "out", "every": 100, "keep": 100},
    }
    run = {name: {**section, **case.ours.get(name, {})} for name, section in sections.items()}
    run |= {name: section for name, section in case.ours.items() if name not in run}
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch), pytest.MonkeyPatch.context() as patch:
        patch.setattr("grape.tuning.Teacher", Watched)
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or rows_of(case.rows)))
        Path("run.yaml").write_text(yaml.safe_dump({**run, "log": "log.duckdb"}))
        done = tune(load_recipe(RUNS[case.verb], "run.yaml", changed))
        with duckdb.connect("log.duckdb", read_only=True) as log:
            told = log.execute("select metrics from steps where run = ? order by step", [done.run]).fetchall()
        saved = {int(path.name[-6:]): load_file(path / "model.safetensors") for path in Path("out").glob("step-*")}
    metrics = [json.loads(text) for (text,) in told]
    return Trained(
        losses=[step["loss"] for step in metrics],
        grad_norms=[step["grad_norm"] for step in metrics],
        metrics=metrics,
        states=saved,
        taken=taken,
    )


def numbers(trained: Trained, rows: Rows) -> list[list[int]]:
    """Which rows each epoch took, in order: those that have what its lessons ask."""
    found = []
    for batch in trained.taken:
        prompts = [list(one.lesson.prompt) for one in batch]
        found.append([at for prompt in prompts for at, row in enumerate(rows) if asked(row)[: len(prompt)] == prompt])
    flat = [at for some in found for at in dict.fromkeys(some)]
    epochs = [flat[at : at + len(rows)] for at in range(0, len(flat), len(rows))]
    assert all(sorted(epoch) == list(range(len(rows))) for epoch in epochs)
    return epochs


def by_trl(case: Case, order: Sequence[Sequence[int]], rows: Rows | None = None, **options: Any) -> Any:
    """What TRL's trainer makes of the same rows."""
    import trainers  # here: without TRL the tests that are not of parity still run

    settings = {"learning_rate": LR, "batch": case.batch, **case.theirs, **options}
    kind = settings.pop("trainer", case.trainer)
    given = [for_trl(row, case) for row in rows or rows_of(case.rows)]
    return trainers.teach(kind, folder(case.verb, case.template), given, order, **settings)


@cache
def ours(name: str) -> Trained:
    """A case as we train it."""
    return by_us(CASES[name])


@cache
def order(name: str) -> list[list[int]]:
    """In which order a case takes its rows."""
    return numbers(ours(name), rows_of(CASES[name].rows))


@cache
def theirs(name: str) -> Any:
    """A case as TRL trains it."""
    return by_trl(CASES[name], order(name))


def distances(mine: Trained, other: Any) -> tuple[float, float, float]:
    """The greatest difference of a loss, of a gradient's norm (relative) and of a weight."""
    assert len(mine.losses) == len(other.losses)
    weights = mine.states[len(mine.losses)]
    assert weights.keys() == other.weights.keys()
    loss = max(abs(a - b) for a, b in zip(mine.losses, other.losses, strict=True))
    norm = max(abs(a - b) / b for a, b in zip(mine.grad_norms, other.grad_norms, strict=True))
    weight = max(float((weights[name] - value).abs().max()) for name, value in other.weights.items())
    return loss, norm, weight


@pytest.fixture(autouse=True)
def one_thread():
    """Models of a few numbers: threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_the_steps_are_those_of_trl(name):
    case, mine, other = CASES[name], ours(name), theirs(name)
    assert len(mine.losses) == (4 if name == "sft, all turns" else 6)
    loss, norm, weight = distances(mine, other)
    assert loss <= LOSS
    assert norm <= NORM
    assert weight <= WEIGHT
    first = load_file(Path(folder(case.verb, case.template), "model.safetensors"))
    assert max(float((value - first[at]).abs().max()) for at, value in other.weights.items()) > 20 * WEIGHT
    for own, there in case.logged.items():  # None where a batch has nothing of the kind
        told = [step.get(own) for step in mine.metrics]
        assert told == pytest.approx([step.get(there) for step in other.metrics], abs=METRIC), own


@pytest.mark.parametrize(("name", "change"), WRONG)
def test_a_wrong_setting_is_noticed(name, change):
    loss, norm, weight = distances(by_us(CASES[name], change), theirs(name))
    assert loss > 10 * LOSS or norm > 10 * NORM or weight > 10 * WEIGHT


@pytest.mark.parametrize("wrong", WRONG_THERE)
def test_what_we_do_not_have_is_noticed(wrong):
    name, options = WRONG_THERE[wrong]
    loss, norm, weight = distances(ours(name), by_trl(CASES[name], order(name), **options))
    assert loss > 10 * LOSS or norm > 10 * NORM or weight > 10 * WEIGHT


# Not the same, by definition -------------------------------------------------------------------------------------


@cache
def start(verb: str, template: str | None = MARKED) -> Any:
    """The model that both sides begin with."""
    return load_policy(folder(verb, template), dtype="float32").model


def logprobs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """By hand: of a response's tokens."""
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()
    return logits_TV.log_softmax(-1)[range(len(response)), list(response)]


def test_the_first_step_of_trls_warmup_moves_nothing_and_none_of_ours_is_wasted():
    name = "sft, linear, warmup"
    mine, other = ours(name), by_trl(SFT(), order(name), lr_scheduler_type="linear", warmup_steps=2)
    assert [step["lr"] / LR for step in mine.metrics] == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert [step["learning_rate"] / LR for step in other.metrics] == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])
    unmoved = by_us(SFT(), "optimizer.lr=1e-12").losses[:2]
    assert other.losses[:2] == pytest.approx(unmoved, abs=LOSS)
    assert abs(mine.losses[1] - unmoved[1]) > 100 * LOSS


def test_what_a_template_writes_after_an_end_is_learned_by_trl_and_not_by_us():
    case = SFT(template=DOTTED)
    mine = by_us(case)
    other = by_trl(case, numbers(mine, rows_of(case.rows)))
    dot = AutoTokenizer.from_pretrained(folder("sft", DOTTED)).convert_tokens_to_ids(".")
    rows = [one.members[0] for one in mine.taken[0]]
    found = [logprobs(start("sft", DOTTED), row.prompt_ids, (*row.token_ids, dot)) for row in rows]
    own, tail, tokens = (sum(f(x_T) for x_T in found) for f in (lambda x_T: x_T[:-1].sum(), lambda x_T: x_T[-1], len))
    assert mine.losses[0] == pytest.approx(-float(own) / (tokens - 4), abs=LOSS)
    assert other.losses[0] == pytest.approx(-float(own + tail) / tokens, abs=LOSS)
    assert abs(mine.losses[0] - other.losses[0]) > 1000 * LOSS


def test_a_question_of_three_pairs_weighs_as_much_as_one_of_a_single_pair_with_us_and_three_times_as_much_in_trl():
    first, second = rows_of("pairs")[0], rows_of("pairs")[4]
    rows = [first, {**first, "rejected": "I give up."}, {**first, "rejected": "Ugh. "}, second]
    case = MODEL(ours={"optimizer": {"epochs": 1}})
    mine, other = by_us(case, rows=rows), by_trl(case, [[0, 1, 2, 3]], rows)
    model, tokenizer = (
        read.from_pretrained(folder("reward-model")) for read in (AutoModelForSequenceClassification, AutoTokenizer)
    )

    def value(row: dict[str, Any], side: str) -> torch.Tensor:
        text = tokenizer.apply_chat_template([*row["question"], said("assistant", row[side])], tokenize=False)
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).logits[0, 0].double()

    a, b, c, d = (float(-logsigmoid(value(row, "chosen") - value(row, "rejected"))) for row in rows)
    assert mine.losses == pytest.approx([((a + b + c) / 3 + d) / 2], abs=LOSS)
    assert other.losses == pytest.approx([(a + b + c + d) / 4], abs=LOSS)
    assert abs(mine.losses[0] - other.losses[0]) > 1000 * LOSS


def test_the_first_term_of_orpo_counts_the_prompts_in_trl_and_the_responses_alone_with_us():
    case, name = CASES["orpo"], "orpo"
    other = by_trl(case, order(name), on_made=None)
    pairs = [one.members for one in ours(name).taken[0]]
    own = [-float(logprobs(start("dpo"), row.prompt_ids, row.token_ids).mean()) for row, _ in pairs]
    whole = [-logprobs(start("dpo"), row.prompt_ids[:1], (*row.prompt_ids[1:], *row.token_ids)) for row, _ in pairs]
    assert ours(name).metrics[0]["nll"] == pytest.approx(sum(own) / 4, abs=LOSS)
    assert other.metrics[0]["nll_loss"] == pytest.approx(float(torch.cat(whole).mean()), abs=LOSS)
    rest = ours(name).losses[0] - ours(name).metrics[0]["nll"]
    assert other.losses[0] - other.metrics[0]["nll_loss"] == pytest.approx(rest, abs=LOSS)
    assert abs(other.losses[0] - ours(name).losses[0]) > 1000 * LOSS


def test_kto_of_one_batch_is_trls_where_its_rows_stand_the_other_way_round():
    """Shifting them by one then gives each question the response to our next one: nothing of TRL's is changed."""
    case = KTO(
        ours={"loss": {"kind": "kto", "beta": 0.3}, "optimizer": {"batch": 10, "epochs": 4}},
        theirs={"beta": 0.3},
        batch=10,
    )
    mine = by_us(case)
    other = by_trl(case, [range(10)] * 4, rows_of("labels")[::-1])
    loss, norm, weight = distances(mine, other)
    assert loss <= LOSS
    assert norm <= NORM
    assert weight <= WEIGHT
    assert [step["kl"] for step in mine.metrics] == pytest.approx([step["kl"] for step in other.metrics], abs=METRIC)
    assert mine.metrics[-1]["kl"] > 100 * METRIC


def test_the_kl_of_kto_is_of_the_whole_batch_with_us_and_of_shifted_micro_batches_in_trl():
    """In the second step, whose weights are the same: the first has a KL of 0 however it is estimated."""
    case = KTO(
        ours={"loss": {"kind": "kto", "beta": 0.3}, "optimizer": {"epochs": 1}, "checkpoint": {"every": 1}},
        theirs={"beta": 0.3},
    )
    mine, rows = by_us(case), rows_of("labels")
    (taken,) = numbers(mine, rows)
    shuffled = [rows[at] for at in taken]
    whole, halves = (by_trl(case, [range(10)], shuffled, micro=micro) for micro in (4, 2))
    moved = load_policy(folder("dpo"), dtype="float32").model
    moved.load_state_dict(mine.states[1], strict=False)
    examples = [one.members[0] for step in mine.taken for one in step]
    in_file = dict(zip(taken, examples, strict=True))

    def estimate(batch: Sequence[Any], answers: Sequence[Any]) -> float:
        found = [
            float((logprobs(moved, *both) - logprobs(start("dpo"), *both)).sum())
            for row, answer in zip(batch, answers, strict=True)
            for both in [(row.prompt_ids, answer.token_ids)]
        ]
        return max(0.0, sum(found) / len(found))

    a, b, c, d = batch = examples[4:8]
    own = estimate(batch, [in_file[(at + 1) % 10] for at in taken[4:8]])
    shifted = estimate(batch, [d, a, b, c])
    parts = (estimate([a, b], [b, a]) + estimate([c, d], [d, c])) / 2
    assert mine.metrics[1]["kl"] == pytest.approx(own, abs=METRIC)
    assert whole.metrics[1]["kl"] == pytest.approx(shifted, abs=METRIC)
    assert halves.metrics[1]["kl"] == pytest.approx(parts, abs=METRIC)
    assert min(abs(own - shifted), abs(shifted - parts), abs(parts - own)) > 100 * METRIC


def test_the_kl_of_kto_never_pairs_a_question_with_a_response_to_itself_with_us():
    rows = [
        {
            "question": [said("user", f"Spell backwards: {word}")],
            "response": f"It is {said_back}.",
            "label": said_back != word,
        }
        for word in ("ab", "cat")
        for said_back in (word[::-1], word)
    ]
    case = KTO(ours={"loss": {"kind": "kto"}, "optimizer": {"epochs": 1}})
    seen: list[Any] = []
    by_trl(case, [range(4)], rows, on_made=lambda made: seen.extend(made.train_dataset))
    own = [[other["completion_ids"] for other in seen if other["prompt_ids"] == row["prompt_ids"]] for row in seen]
    assert [row["KL_completion_ids"] in answers for row, answers in zip(seen, own, strict=True)] == [False, True] * 2
    examples = by_us(case, rows=rows).taken[0]
    assert all(one.other.prompt_ids == one.members[0].prompt_ids for one in examples)
    own = [[row.members[0].token_ids for row in examples if row.lesson.prompt == one.lesson.prompt] for one in examples]
    assert [one.other.token_ids in answers for one, answers in zip(examples, own, strict=True)] == [False] * 4
