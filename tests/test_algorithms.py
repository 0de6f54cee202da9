"""The files of examples/algorithms: each run is followed by hand, with the algorithm's formula written out here."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from apprentice import ask
from safetensors.torch import load_file
from tiny import tiny_classifier
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import grape
from grape.attention import switched
from grape.head import token_logprobs
from grape.logprobs import scattered
from grape.packing import Packing
from grape.policy import logits
from grape.step import Step

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples/algorithms"
POLICY = FOLDER / "policy"
LIMIT, BUFFER, GROUPS = 8, 4, 4  # the greatest length of a response, DAPO's buffer, the groups of a step here
LR = 3e-3


@dataclass(kw_only=True)
class Row:
    """A response as the formulas need it; tensors are of its T tokens, `dist` of T x V."""

    id: str
    question: str
    prompt: list[int]
    tokens: list[int]
    reward: float
    logged: float  # its advantage in the log
    peers: list[float] = ()  # the rewards of its group
    new: Tensor = None
    old: Tensor = None
    ref: Tensor = None
    value: Tensor = None
    old_value: Tensor = None
    dist: Tensor = None
    old_dist: Tensor = None

    @property
    def centred(self) -> float:
        return self.reward - statistics.fmean(self.peers)

    @property
    def left_out(self) -> float:
        return self.reward - (sum(self.peers) - self.reward) / (len(self.peers) - 1)

    @property
    def standard(self) -> float:
        return self.centred / (statistics.stdev(self.peers) + 1e-4)


# The formulas. Each takes the rows of a batch and gives its loss.


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def clipped(ratio, advantage, low, high):
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def rho(row):
    return (row.new - row.old).exp()


def reinforce(rows):
    return -mean(row.reward * row.new.sum() for row in rows)


def rloo(rows):
    gain = {row.id: row.reward - 0.05 * (row.old - row.ref).sum() for row in rows}
    groups = {row.question: [gain[peer.id] for peer in rows if peer.question == row.question] for row in rows}
    return -mean(
        (gain[row.id] - (sum(groups[row.question]) - gain[row.id]) / (len(groups[row.question]) - 1)) * row.new.sum()
        for row in rows
    )


def generalised(row, lam, penalty):
    """Advantages by GAE with gamma 1, from the rewards of the tokens and the values before them."""
    gains = penalty.clone()
    gains[-1] += row.reward
    deltas = gains + torch.cat([row.old_value[1:], torch.zeros(1)]) - row.old_value
    return torch.stack(
        [sum(lam**ahead * delta for ahead, delta in enumerate(deltas[at:])) for at in range(len(deltas))]
    )


def ppo(rows):
    policy, values = [], []
    for row in rows:
        advantage = generalised(row, 0.95, -0.05 * (row.old - row.ref))
        returns = advantage + row.old_value
        near = row.old_value + (row.value - row.old_value).clamp(-0.2, 0.2)
        policy.append(clipped(rho(row), advantage, 0.2, 0.2).mean())
        values.append((torch.maximum((row.value - returns) ** 2, (near - returns) ** 2) / 2).mean())
    return -mean(policy) + 0.5 * mean(values)


def trpo(rows):
    surrogate = mean((rho(row) * (row.reward - row.old_value)).sum() for row in rows)
    kl = mean((row.old_dist.exp() * (row.old_dist - row.dist)).sum() for row in rows)
    return -surrogate + 1.0 * kl + 0.5 * mean(((row.value - row.reward) ** 2 / 2).sum() for row in rows)


def grpo(rows):
    def k3(row):
        return (row.ref - row.new).exp() - (row.ref - row.new) - 1

    return -mean((clipped(rho(row), row.standard, 0.2, 0.2) - 0.04 * k3(row)).mean() for row in rows)


def dr_grpo(rows):
    return -mean(clipped(rho(row), row.centred, 0.2, 0.2).sum() / LIMIT for row in rows)


def dapo(rows):
    tokens = sum(len(row.tokens) for row in rows)
    return -sum(clipped(rho(row), row.standard, 0.2, 0.28).sum() for row in rows) / tokens


def gspo(rows):
    return -mean(clipped((row.new - row.old).mean().exp(), row.standard, 3e-4, 4e-4) for row in rows)


def topr(rows):
    def weight(row):
        return 1.0 if row.centred >= 0 else min((row.new - row.old).sum().exp().item(), 1.0)

    return -mean(weight(row) * row.centred * row.new.sum() for row in rows)


def grape_loss(rows):
    return -mean(clipped(rho(row), row.centred, 0.2, 0.2).sum() for row in rows)


def grape_sequence(rows):
    return -mean(clipped((row.new - row.old).sum().exp(), row.centred, 0.2, 0.2) for row in rows)


def plain(row):
    return row.reward


def centred(row):
    return row.centred


def standard(row):
    return row.standard


def left_out(row):
    return row.left_out


ALGORITHMS = {  # the loss, the epochs over a batch, and the advantage that the log holds
    "reinforce": (reinforce, 1, plain),
    "rloo": (rloo, 1, left_out),
    "ppo": (ppo, 4, plain),
    "trpo": (trpo, 4, plain),
    "grpo": (grpo, 2, standard),
    "dr-grpo": (dr_grpo, 2, centred),
    "dapo": (dapo, 2, standard),
    "gspo": (gspo, 2, standard),
    "topr": (topr, 4, centred),
    "grape": (grape_loss, 2, centred),
    "grape-sequence": (grape_sequence, 2, centred),
}


# A run, and its rollouts.


class EnoughError(Exception):
    """A run that is stopped leaves the journal of its steps."""


def train(name, folder, *overrides, report=None, **checkpoint):
    """A run of a file, with its log and checkpoints in a folder."""
    checkpoint = json.dumps({"dir": str(folder / "checkpoints"), "every": 1000, **checkpoint})
    overrides = (f"log={folder / 'log.duckdb'}", f"checkpoint={checkpoint}", *overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # as the files' paths are meant
        return asyncio.run(grape.train(f"examples/algorithms/{name}.yaml", overrides=overrides, report=report))


def begin(name, folder, *overrides, steps=2):
    """The first steps of a run, left as a kill would leave them: in the log and in the journal."""

    def stop(step):
        if step.step == steps:
            raise EnoughError

    with pytest.raises(EnoughError):
        train(name, folder, *overrides, report=stop)


def drawn(folder, step):
    """The tokens of a step's responses. They say more than texts do, which leave out control tokens."""
    journal = folder / f"checkpoints/journal/step-{step:06d}.json"
    return {member["response_id"]: member["token_ids"] for member in json.loads(journal.read_bytes())["members"]}


def rubric_reward(scores):
    """Eq. 15 of rubrics/words.yaml: three items, the third of which is judged with confidence 0.5."""
    weight = {"letter": 0.5, "short": 0.25, "sound": 0.25}
    confidence = {"letter": 1.0, "short": 1.0, "sound": 0.5}
    return 3 * sum(weight[item] * scores[item] * confidence[item] for item in weight) / sum(confidence.values())


def overlong(length, finish):
    """DAPO's penalty, eq. 13 of its paper."""
    return -1.0 if finish == "length" else min(0.0, (LIMIT - BUFFER - length) / BUFFER)


def rows_of(folder, step, *, soft=False):
    """The trained responses of a step in their order, with rewards made of the log's scores."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    log, tokens = folder / "log.duckdb", drawn(folder, step)
    found = ask(
        log,
        "select response_id, question_id, question, finish_reason, num_tokens, advantage, list({'item': item, 'score': score})"
        " from responses join rewards using (run, step, response_id, question_id)"
        " join questions using (run, question_id) join verdicts using (run, step, response_id, question_id)"
        f" where step = {step} group by all order by any_value(responses.rowid)",
    )
    rows = []
    for response, name, question, finish, length, advantage, verdicts in found:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        cut = soft and finish == "length"  # and not judged
        reward = 0.0 if cut else rubric_reward({verdict["item"]: verdict["score"] for verdict in verdicts})
        reward += overlong(length, finish) if soft else 0.0
        rows.append(
            Row(id=response, question=name, prompt=ids, tokens=tokens.get(response), reward=reward, logged=advantage)
        )
    for row in rows:
        row.peers = [peer.reward for peer in rows if peer.question == row.question]
    return rows


# The run again, by full logits.


def read(model, head, rows):
    """Log-probabilities T x V and values T of each row."""
    ids = torch.zeros(len(rows), max(len(row.prompt) + len(row.tokens) for row in rows), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row.prompt) + len(row.tokens)] = torch.tensor(row.prompt + row.tokens)
    out = model(input_ids=ids, output_hidden_states=True)  # causal: what stands behind a row changes nothing in it
    for number, row in enumerate(rows):
        at = slice(len(row.prompt) - 1, len(row.prompt) + len(row.tokens) - 1)
        yield out.logits[number, at].log_softmax(-1), head(out.hidden_states[-1][number, at]).squeeze(-1)


def chosen(dist, row):
    return dist[torch.arange(len(row.tokens)), torch.tensor(row.tokens)]


def followed(loss_of, epochs, batches):
    """The mean loss and gradient norm of each step, by a plain loop."""
    model, reference = (AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval() for _ in range(2))
    head = torch.nn.Linear(32, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    weights = [*model.parameters(), *head.parameters()]
    adam = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0)
    results = []
    for rows in batches:
        with torch.no_grad():
            for row, (dist, value), (ref, _) in zip(
                rows, read(model, head, rows), read(reference, head, rows), strict=True
            ):
                row.old_dist, row.old, row.ref, row.old_value = dist, chosen(dist, row), chosen(ref, row), value
        seen = []
        for _ in range(epochs):
            for row, (row.dist, row.value) in zip(rows, read(model, head, rows), strict=True):
                row.new = chosen(row.dist, row)
            loss = loss_of(rows)
            adam.zero_grad()
            loss.backward()
            seen.append((loss.item(), torch.nn.utils.clip_grad_norm_(weights, 1.0).item()))
            adam.step()
        results.append(tuple(statistics.fmean(values) for values in zip(*seen, strict=True)))
    return results


def learning(rows, rounds):
    """The questions that a step trains on: dynamic sampling asks further ones in place of groups of equal rewards."""
    asked = list(dict.fromkeys(row.question for row in rows))
    alive = {row.question for row in rows if len(set(row.peers)) > 1}
    number = GROUPS
    for _ in range(rounds - 1):
        number += GROUPS - len(alive & set(asked[:number]))
    assert len(asked) == number
    return {*sorted(asked, key=lambda question: question not in alive)[:GROUPS]}


def follow(name, folder, steps=2):
    """Hold a run against its algorithm: every advantage, and each step's loss and gradient."""
    loss_of, epochs, advantage = ALGORITHMS[name]
    batches = []
    for step in range(1, steps + 1):
        rows = rows_of(folder, step, soft=name == "dapo")
        for row in rows:
            assert row.logged == pytest.approx(advantage(row), abs=1e-9)
        trained = learning(rows, rounds=3 if name == "dapo" else 1)
        assert trained == {row.question for row in rows if row.tokens}
        batches.append([row for row in rows if row.tokens])
    metrics = [json.loads(text) for (text,) in ask(folder / "log.duckdb", "select metrics from steps order by step")]
    for found, (loss, norm) in zip(metrics, followed(loss_of, epochs, batches), strict=True):
        assert found["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert found["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)
    return metrics, batches


SMALL = (f"sampling.questions={GROUPS}", "sampling.responses=6")  # what the algorithm leaves open


@pytest.mark.parametrize(
    "name", [name if name in ("grape", "ppo") else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]
)
def test_the_file_of_an_algorithm_trains_by_its_formula(tmp_path, name):
    begin(name, tmp_path, *SMALL)
    metrics, batches = follow(name, tmp_path)
    if name in ("ppo", "grpo", "dr-grpo", "dapo", "gspo", "grape", "grape-sequence"):
        for clip in ("clip_low", "clip_high"):
            assert sum(step[clip] for step in metrics) > 0  # otherwise the clip was not put to the test
    lengths = [len(row.tokens) for row in batches[0]]
    assert min(lengths) < max(lengths) == LIMIT  # nor would be the aggregate, and what is done where a response is cut


PAIRS = (f"sampling.questions={GROUPS}", "sampling.responses=2", "seed=5")  # of which some have equal rewards


def test_dapo_asks_further_questions_in_place_of_groups_of_equal_rewards(tmp_path):
    begin("dapo", tmp_path, *PAIRS)
    follow("dapo", tmp_path)
    assert ask(tmp_path / "log.duckdb", f"select num_questions > {GROUPS} from steps") == [(True,), (True,)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrong"),
    [(name, wrong) for name, settings in {
        "reinforce": ("loss.aggregate=token-mean", "advantage.baseline=group_mean", "optimizer.epochs=2"),
        "rloo": ("advantage.baseline=group_mean", "loss.kl_coef=0.1", "loss.ratio=none", "loss.kl=k3"),
        "ppo": ("value.lam=1.0", "value.gamma=0.9", "value.coef=1.0", "value.clip=null", "loss.clip_low=0.3",
                "loss.clip_high=0.3", "loss.kl_coef=0.1", "optimizer.epochs=3", "loss.aggregate=token-mean"),
        "trpo": ("value.lam=0.95", "value.clip=0.2", "loss.kl_coef=0.5", "loss.kl=full", "loss.aggregate=token-mean"),
        "grpo": ("advantage.scale=none", "advantage.scale=batch_std", "loss.kl=k2", "loss.kl_coef=0.05",
                 "loss.aggregate=token-mean", "loss.clip_low=0.3", "loss.clip_high=0.28"),
        "dr-grpo": ("loss.norm_length=9", "advantage.baseline=leave_one_out", "loss.clip_high=0.28"),
        "dapo": ("truncation.how=keep", "truncation.buffer=3", "loss.clip_high=0.2", "advantage.scale=none",
                 "loss.aggregate=seq-mean-token-mean"),
        "gspo": ("loss.ratio=sequence", "loss.clip_low=0.0004", "loss.clip_high=0.0003"),
        "topr": ("loss.ratio=sequence", "optimizer.epochs=3", "advantage.baseline=none"),
        "grape": ("loss.aggregate=token-mean", "advantage.scale=group_std", "loss.clip_low=0.25", "loss.ratio=sequence"),
        "grape-sequence": ("loss.ratio=sequence-mean", "loss.clip_low=0.25", "loss.clip_high=0.25"),
    }.items() for wrong in settings],
)  # fmt: skip
def test_a_file_that_says_something_else_is_found_out(tmp_path, name, wrong):
    begin(name, tmp_path, *SMALL, wrong)
    with pytest.raises(AssertionError):
        follow(name, tmp_path)


@pytest.mark.slow
def test_dapo_without_its_rounds_is_found_out(tmp_path):
    begin("dapo", tmp_path, *PAIRS, "sampling.rounds=1")
    with pytest.raises(AssertionError):
        follow("dapo", tmp_path)


def test_every_file_is_an_algorithm_of_this_page():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(ALGORITHMS)
    assert all(f"`{name}.yaml`" in (FOLDER / "README.md").read_text() for name in ALGORITHMS)


@pytest.mark.slow
def test_the_warning_of_equation_17_is_one_line_once(tmp_path):
    command = [
        sys.executable,
        "-c",
        "from grape.cli import main; main()",
        "train",
        "examples/algorithms/grape-sequence.yaml",
    ]
    done = subprocess.run(
        [*command, f"log={tmp_path / 'log.duckdb'}", "steps=3"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert done.stderr.count("warning: ") == 1
    assert (
        "grape: warning: ratio='sequence' (eq. 17) clips whole sequences: the relaxed constraint can make the model"
        " collapse; the paper advises to start with 'token' (eq. 14)\n"
    ) in done.stderr


# GRAPE with one raw item of a reward model is Dr. GRPO.


def judged_by_a_model(folder, formula):
    """A folder with a rubric of one item, the raw value of a reward model."""
    if not (folder / "classifier").exists():
        tiny_classifier(folder / "classifier")
    rubrics = folder / formula
    rubrics.mkdir()
    item = {"id": "liked", "reward_model": str(folder / "classifier"), "raw": True}
    (rubrics / "words.yaml").write_text(json.dumps({"rubric": "words", "formula": formula, "items": [item]}))
    return f"rubrics={rubrics}"


def dr_grpo_by_hand(folder, steps, *, low=0.2, high=0.2, epochs=2):
    """Dr. GRPO over the rollouts of a run, from rewards to weights; only the forward pass is the library's."""
    policy, judge = AutoTokenizer.from_pretrained(POLICY), AutoTokenizer.from_pretrained(folder / "classifier")
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()
    rewards_of = AutoModelForSequenceClassification.from_pretrained(folder / "classifier").eval()
    weights = sorted(model.parameters(), key=lambda weight: weight.dim() == 1)  # the order in which norms are added up
    adam = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0)
    advantages, losses = [], []
    for step in range(1, steps + 1):
        journal = folder / f"begun/checkpoints/journal/step-{step:06d}.json"
        members = Step.read(journal.read_bytes()).members
        asked = dict(ask(folder / "begun/log.duckdb", "select question_id, question from questions"))
        rewards = []
        for member in members:
            answer = policy.decode(member.token_ids, skip_special_tokens=True)
            question = asked[member.group]
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            text = judge.apply_chat_template(chat, tokenize=False)
            with torch.no_grad():
                rewards.append(rewards_of(**judge(text, add_special_tokens=False, return_tensors="pt")).logits.item())
        groups = np.array(rewards).reshape(GROUPS, -1)
        gains = (groups - np.cumsum(groups, axis=1)[:, -1:] / groups.shape[1]).ravel()
        (batch,) = Packing(model, 0).batches(members, 10**6)
        assert batch.members == tuple(members)
        gain = torch.tensor(gains, dtype=torch.float32)[:, None]
        old, seen = None, []
        for _ in range(epochs):
            with switched(model):
                states = batch.text.states(model)
            new_N, _, _ = token_logprobs(partial(logits, model), states, batch.labels_N)
            mask, new = batch.mask_BT, scattered(new_N, batch.mask_BT)
            old = new.detach() if old is None else old
            ratio = (new - old).exp()
            objective = torch.minimum(ratio * gain, ratio.clamp(1 - low, 1 + high) * gain)
            loss = -((torch.where(mask, objective, 0.0).sum(1) / LIMIT).sum() / len(members))
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            adam.step()
            seen.append(loss.item())
        advantages += gains.tolist()
        losses.append(sum(seen) / epochs)
    return advantages, losses, model.state_dict()


@pytest.mark.slow
def test_grape_with_one_raw_reward_model_is_dr_grpo_to_the_bit(tmp_path):
    steps = 3
    grape_rubric, plain_rubric = (judged_by_a_model(tmp_path, formula) for formula in ("grape", "weighted"))
    norm = ("loss.aggregate=seq-mean-token-sum-norm", f"loss.norm_length={LIMIT}")
    for name in ("begun", "ours", "theirs"):
        (tmp_path / name).mkdir()
    begin("grape", tmp_path / "begun", *SMALL, *norm, grape_rubric, steps=steps)
    train("grape", tmp_path / "ours", *SMALL, *norm, grape_rubric, f"steps={steps}")
    train("dr-grpo", tmp_path / "theirs", *SMALL, plain_rubric, f"steps={steps}")

    advantages, losses, weights = dr_grpo_by_hand(tmp_path, steps)
    assert max(map(abs, advantages)) > 0.1
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        log = folder / "log.duckdb"
        assert ask(log, "select distinct confidence, item from verdicts") == [(1.0, "liked")]
        found = ask(
            log, "select advantage from rewards join responses using (run, step, response_id) order by responses.rowid"
        )
        assert [advantage for (advantage,) in found] == advantages
        assert [loss for (loss,) in ask(log, "select (metrics->>'loss')::double from steps order by step")] == losses
        (saved,) = (folder / "checkpoints").glob("step-*/model.safetensors")
        trained = load_file(saved)
        assert all(torch.equal(weight, weights[name]) for name, weight in trained.items())
    before = load_file(POLICY / "model.safetensors")
    assert not any(torch.equal(weight, before[name].float()) for name, weight in trained.items())
