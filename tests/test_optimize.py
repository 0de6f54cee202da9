"""The optimizer: every loss against a plain computation with all logits, and what must leave the weights alone."""

from __future__ import annotations

import copy
import math
import os
import random
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from tiny import tiny_folder, tiny_model, tiny_tokenizer

from grape.adapters import add_lora
from grape.config import Lora, OptimizerConfig, parse_run
from grape.descent import schedule
from grape.errors import ConfigError, GrapeError
from grape.logprobs import response_logprobs
from grape.member import Member, make_batch
from grape.objective import Objective
from grape.optimize import Optimizer
from grape.packing import padded, rows_of
from grape.policy import Policy, load_policy

CPU = {"policy": {"model": "m", "dtype": "float32"}, "questions": {"path": "q.jsonl"}}
SHARP = {"lr": 3e-3, "max_grad_norm": 1e9, "micro_tokens": 40}  # far enough in one update that ratios are clipped


@pytest.fixture(autouse=True)
def one_thread():
    """Models of a few numbers: threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_config(**sections):
    return parse_run({**CPU, "steps": 4, **sections}, "run.yaml")


def policy_of(model):
    return Policy(model=model, tokenizer=tiny_tokenizer(), stop_ids=(1,), pad_id=0)


def double(seed=0):
    """A policy of float64 throughout: no norm in it computes in float32, as RMSNorm does."""
    return policy_of(tiny_model("gpt_neox", seed=seed).double())


def some(count=8, *, seed=0, **fields):
    """Members in groups of four; advantages are eighths, every third member came from another context.

    Three of each group have one prompt, the last has its own.
    """
    draw = random.Random(seed)
    prompts = [tuple(draw.randrange(3, 90) for _ in range(draw.randrange(1, 7))) for _ in range(count)]

    def one(number):
        tokens = tuple(draw.randrange(3, 90) for _ in range(draw.randrange(2, 9)))
        return Member(
            response_id=f"r{number}",
            group=f"g{number // 4}",
            prompt_ids=prompts[number if number % 4 == 3 else number // 4 * 4],
            token_ids=tokens,
            rollout_logprobs=tuple(draw.uniform(-6, -2) for _ in tokens) if number % 3 else None,
            advantage=draw.randrange(-8, 9) / 8,
            reward=draw.randrange(0, 9) / 8,
            trained=True,
            off_policy=number % 3 == 1,
        )

    return [replace(one(number), **fields) for number in range(count)]


def optimizer_of(policy, config, reference=None):
    return Optimizer(policy, config, Accelerator(cpu=True), reference=reference)


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_close(model, other, atol):
    theirs = weights(other)
    for name, weight in weights(model).items():
        torch.testing.assert_close(
            weight, theirs[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def equal(model, other):
    theirs = weights(other)
    return all(torch.equal(weight, theirs[name]) for name, weight in weights(model).items())


# The same by hand: one response at a time, without padding, with all logits.


def read(model, member):
    """The states before a response's tokens, and the log-probabilities of all tokens there: T x H and T x V."""
    ids = torch.tensor([[*member.prompt_ids, *member.token_ids]])
    at = slice(len(member.prompt_ids) - 1, -1)
    out = model(input_ids=ids, output_hidden_states=True)
    return out.hidden_states[-1][0, at], out.logits[0, at].log_softmax(-1)


def picked(dist_TV, member):
    return dist_TV[range(len(member.token_ids)), list(member.token_ids)]


def by_hand(model, reference, members, config, steps):
    """``steps`` steps of the optimizer; the value head's weights are returned."""
    head = torch.nn.Linear(64, 1).double()
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1]},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
            {"params": [head.weight], "lr": (config.value and config.value.lr) or config.optimizer.lr},
            {
                "params": [head.bias],
                "lr": (config.value and config.value.lr) or config.optimizer.lr,
                "weight_decay": 0.0,
            },
        ],
        lr=config.optimizer.lr,
        weight_decay=config.optimizer.weight_decay,
    )
    for _ in range(steps):
        with torch.no_grad():
            old = [read(model, member) for member in members]
            refs = [read(reference, member)[1] for member in members]
            values = [head(states).squeeze(-1) for states, _ in old]
        for _ in range(config.optimizer.epochs):
            loss = loss_by_hand(model, head, [dist for _, dist in old], refs, values, members, config)
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], config.optimizer.max_grad_norm)
            adam.step()
    return head


def loss_by_hand(model, head, olds, refs, old_values, members, config):
    setting, total = config.loss, 0.0
    tokens = sum(len(member.token_ids) for member in members)

    def over(value_T):  # its part of the aggregate
        if setting.aggregate == "token-mean":
            return value_T.sum() / tokens
        if setting.aggregate == "seq-mean-token-mean":
            return value_T.mean() / len(members)
        norm = setting.norm_length if setting.aggregate == "seq-mean-token-sum-norm" else 1
        return value_T.sum() / norm / len(members)

    pens = [
        -setting.kl_coef * (picked(old, m) - picked(ref, m)) for old, ref, m in zip(olds, refs, members, strict=True)
    ]
    for number, member in enumerate(members):
        if not member.trained:
            continue
        states, dist = read(model, member)
        new, old, ref = picked(dist, member), picked(olds[number], member), picked(refs[number], member)
        sequence = setting.ratio in ("sequence", "sequence-mean", "tapered")
        gain = torch.full_like(new, member.advantage)
        if setting.kl == "reward":
            mates = [float(pens[at].sum()) for at, mate in enumerate(members) if mate.group == member.group]
            better = pens[number].sum() - sum(mates) / len(mates)
            if config.advantage.baseline == "leave_one_out":
                better = better * len(mates) / (len(mates) - 1)
            gain = gain + (better if sequence else pens[number])
        if config.value:
            rewards = torch.zeros_like(new)
            rewards[-1] = member.reward
            rewards = rewards + (pens[number] if setting.kl == "reward" else 0)
            value = old_values[number]
            gain, returns = gae_by_hand(rewards.tolist(), value.tolist(), config.value.gamma, config.value.lam)
            now = head(states).squeeze(-1)
            near = value + (now - value).clamp(-config.value.clip, config.value.clip)
            error = torch.maximum((now - returns) ** 2, (near - returns) ** 2) / 2
            total = total + config.value.coef * over(error)
        change = new - old
        if sequence:
            gain, change = gain[0], change.sum()
        if setting.ratio == "sequence-mean":
            change = change / len(new)
        rho = change.exp()
        low, high = (math.inf, math.inf) if setting.kl == "trpo" else (setting.clip_low, setting.clip_high)
        term = torch.minimum(rho * gain, rho.clamp(1 - low, 1 + high) * gain)
        if setting.dual_clip and gain[0] < 0:
            term = torch.maximum(term, setting.dual_clip * gain)
        if setting.ratio == "none":
            term = gain * new
        if setting.ratio == "tapered":
            term = gain * (rho.detach().clamp(max=1) if gain < 0 else 1) * new.sum()
        if setting.rollout_cap and member.off_policy and member.rollout_logprobs:
            drift = old - torch.tensor(member.rollout_logprobs).double()
            drift = drift.sum() / (len(new) if setting.ratio == "sequence-mean" else 1) if sequence else drift
            term = term * drift.exp().clamp(max=setting.rollout_cap)
        total = total - (term / len(members) if sequence else over(term))
        total = total - setting.entropy_coef * over(-(dist.exp() * dist).sum(-1))
        if setting.kl == "k2":
            total = total + setting.kl_coef * over((new - ref) ** 2 / 2)
        if setting.kl == "k3":
            total = total + setting.kl_coef * over((ref - new).exp() - 1 - (ref - new))
        if setting.kl == "full":
            total = total + setting.kl_coef * over((dist.exp() * (dist - refs[number])).sum(-1))
        if setting.kl == "trpo":
            total = total + setting.kl_coef * over((olds[number].exp() * (olds[number] - dist)).sum(-1))
    return total


def gae_by_hand(rewards, values, gamma, lam):
    """The definition: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    after = [*values[1:], 0.0]
    deltas = [reward + gamma * then - now for reward, then, now in zip(rewards, after, values, strict=True)]
    gains = [
        sum((gamma * lam) ** ahead * delta for ahead, delta in enumerate(deltas[at:])) for at in range(len(deltas))
    ]
    gains = torch.tensor(gains, dtype=torch.float64)
    return gains, gains + torch.tensor(values, dtype=torch.float64)


NO_BASELINE = {"baseline": "none"}
CASES = {
    "one epoch": {},
    "two epochs": {"optimizer": {"epochs": 2}},
    "three epochs, narrow clip": {"optimizer": {"epochs": 3}, "loss": {"clip_low": 0.05, "clip_high": 0.1}},
    "weight decay": {"optimizer": {"weight_decay": 0.5}},
    "clipped gradient": {"optimizer": {"max_grad_norm": 0.3, "lr": 3e-4, "epochs": 2}},
    "eq. 17": {"optimizer": {"epochs": 2}, "loss": {"ratio": "sequence"}},
    "sequence-mean": {
        "optimizer": {"epochs": 2},
        "loss": {"ratio": "sequence-mean", "clip_low": 0.02, "clip_high": 0.02},
    },
    "tapered": {"optimizer": {"epochs": 2}, "loss": {"ratio": "tapered"}},
    "none": {"optimizer": {"epochs": 2}, "loss": {"ratio": "none"}},
    "token-mean": {"loss": {"aggregate": "token-mean"}},
    "seq-mean-token-mean": {"loss": {"aggregate": "seq-mean-token-mean"}},
    "norm": {"loss": {"aggregate": "seq-mean-token-sum-norm", "norm_length": 7.0}},
    "entropy": {"loss": {"entropy_coef": 0.3}},
    "rollout weights": {"optimizer": {"epochs": 2}, "loss": {"rollout_cap": 1.5}},
    "rollout weights per sequence": {
        "optimizer": {"epochs": 2},
        "loss": {"rollout_cap": 1.5, "ratio": "sequence-mean"},
    },
    "k2": {"loss": {"kl": "k2", "kl_coef": 0.3}},
    "k3": {"optimizer": {"epochs": 2}, "loss": {"kl": "k3", "kl_coef": 0.3}},
    "full": {"optimizer": {"epochs": 2}, "loss": {"kl": "full", "kl_coef": 0.3, "aggregate": "token-mean"}},
    "eq. 12": {"optimizer": {"epochs": 2}, "loss": {"kl": "reward", "kl_coef": 0.3}},
    "eq. 12 per sequence": {"optimizer": {"epochs": 2}, "loss": {"kl": "reward", "kl_coef": 0.1, "ratio": "sequence"}},
    "eq. 12 per sequence, leave one out": {
        "loss": {"kl": "reward", "kl_coef": 0.1, "ratio": "sequence-mean"},
        "advantage": {"baseline": "leave_one_out"},
    },
    "dual clip": {"optimizer": {"epochs": 3, "lr": 1e-2}, "loss": {"dual_clip": 1.1}},
    "eq. 9": {"optimizer": {"epochs": 3}, "loss": {"kl": "trpo", "kl_coef": 3.0}},
    "eq. 9, one epoch": {"loss": {"kl": "trpo", "kl_coef": 3.0}},
    "value head": {"value": {"lam": 0.9, "gamma": 0.97, "lr": 1e-2}, "advantage": NO_BASELINE},
    "value head, epochs": {
        "value": {"lam": 0.9, "clip": 0.02, "lr": 1e-2, "coef": 0.7},
        "advantage": NO_BASELINE,
        "optimizer": {"epochs": 3, "weight_decay": 0.1},
    },
    "value head, eq. 12": {
        "value": {},
        "advantage": NO_BASELINE,
        "loss": {"kl": "reward", "kl_coef": 0.3, "aggregate": "token-mean"},
    },
}


@pytest.mark.filterwarnings("ignore:ratio='sequence'")
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if i % 3 else ()) for i, c in enumerate(CASES)]
)
def test_two_steps_are_those_of_a_plain_computation(case):
    given = CASES[case]
    config = run_config(**{**given, "optimizer": {**SHARP, **given.get("optimizer", {})}})
    policy, reference, plain = double(), double(seed=1), double().model
    members = some()
    optimizer = optimizer_of(policy, config, reference)
    for step in (1, 2):
        optimizer.update(members, step)
    head = by_hand(plain, reference.model, members, config, 2)
    assert_close(policy.model, plain, atol=2e-6)
    assert not equal(policy.model, double().model)
    if config.value:
        assert optimizer.objective.value_head.weight.abs().max() > 1e-3
        assert_close(optimizer.objective.value_head, head, atol=2e-6)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("ratio", ["token", "sequence-mean", "tapered", "none"])
def test_the_first_gradient_is_minus_the_advantage_times_that_of_log_pi(ratio):
    policy, members = double(), some()
    rows = rows_of(members)
    text = padded(rows, 0, "cpu")
    batch = make_batch(members, text, "cpu")
    objective = Objective(policy, run_config(loss={"ratio": ratio}), None)
    loss, metrics, _ = objective.loss(batch, None, num_sequences=8, num_tokens=999)
    got = gradient(policy.model, loss)
    logprobs_BT, _ = response_logprobs(policy.model, text.ids_BT, text.attended_BT, text.mask_BT)
    weight_B = torch.tensor([-member.advantage / 8 for member in members], dtype=torch.float64)
    if ratio == "sequence-mean":
        weight_B = weight_B / batch.mask_BT.sum(1)
    wanted = gradient(policy.model, (weight_B[:, None] * logprobs_BT).sum())
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-9, msg=name)
    assert metrics["ratio_max"] == 1


@pytest.mark.parametrize("loss", [{}, {"ratio": "sequence-mean"}, {"rollout_cap": 2.0}, {"kl": "trpo", "kl_coef": 1.0}])
def test_ratios_are_one_to_the_bit_before_the_first_update(loss):
    config = run_config(loss=loss, optimizer={"epochs": 2, "lr": 3e-3})
    policy, seen = policy_of(tiny_model()), []
    optimizer = optimizer_of(policy, config)
    epoch = optimizer._epoch
    optimizer._epoch = lambda *args: seen.append(epoch(*args)) or seen[-1]
    optimizer.update(some(), 1)
    first, second = seen
    assert first["ratio_max"] == 1
    assert first["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert first["approx_kl"] == first["clip_low"] == first["clip_high"] == 0
    assert first.get("old_kl", 0.0) == pytest.approx(0, abs=1e-7)
    assert second["ratio_max"] > 1.01
    assert second["approx_kl"] > 0
    assert second.get("old_kl", 1.0) > 1e-4


ALL_ON = {
    "loss": {"kl": "k3", "kl_coef": 0.1, "entropy_coef": 0.1, "rollout_cap": 1.5},
    "value": {"lr": 1e-2},
    "advantage": NO_BASELINE,
}


@pytest.mark.parametrize("aggregate", ["seq-mean-token-sum", "token-mean", "seq-mean-token-mean"])
def test_the_cut_into_micro_batches_changes_no_weight_and_no_metric(aggregate):
    results = []
    for micro_tokens in (1, 30, 10_000):
        config = run_config(
            **{**ALL_ON, "loss": {**ALL_ON["loss"], "aggregate": aggregate}},
            optimizer={**SHARP, "epochs": 2, "micro_tokens": micro_tokens},
        )
        policy = double()
        update = optimizer_of(policy, config, double(seed=1)).update(some(), 1)
        results.append((policy.model, update))
    for model, update in results[1:]:
        assert_close(model, results[0][0], atol=1e-7)
        assert update.logprobs == pytest.approx(results[0][1].logprobs, abs=1e-9)
        for name in update.metrics.keys() - {"computed"}:
            assert update.metrics[name] == pytest.approx(results[0][1].metrics[name], abs=1e-7), name
    computed = [update.metrics["computed"] for _, update in results]
    assert 1 > computed[0] > computed[1] > computed[2]  # the more of a group are together, the less


@pytest.mark.parametrize("how", ["seq-mean-token-sum", "token-mean", "seq-mean-token-mean", "per sequence"])
def test_a_member_that_is_not_trained_counts_in_the_denominators_alone(how):
    """Eight members of which four are masked have half the gradient of the four alone."""
    loss = {"ratio": "sequence-mean"} if how == "per sequence" else {"aggregate": how}
    config = run_config(loss=loss, optimizer={"max_grad_norm": 1e9})
    four = [replace(member, token_ids=(5, 6, 7), rollout_logprobs=None) for member in some(4)]
    masked = [replace(member, response_id="m" + member.response_id, trained=False) for member in four]
    norms, entropies = [], []
    for members in (four, [*four, *masked]):
        update = optimizer_of(double(), config).update(members, 1)
        norms.append(update.metrics["grad_norm"])
        entropies.append(update.metrics["entropy"])
        assert update.logprobs.keys() == {member.response_id for member in four}
        assert update.metrics["ratio_mean"] == pytest.approx(1, abs=1e-12)
        assert update.metrics["tokens"] == 12
    assert norms[1] == pytest.approx(norms[0] / 2, rel=1e-9)
    assert entropies[1] == pytest.approx(entropies[0], rel=1e-9)


def test_nothing_to_train_on_changes_nothing():
    policy = policy_of(tiny_model())
    optimizer = optimizer_of(policy, run_config(optimizer={"lr": 1e-2}))
    optimizer.update(some(), 1)  # AdamW has momentum now
    before = copy.deepcopy(policy.model)
    for members in ([], some(trained=False)):
        update = optimizer.update(members, 2)
        assert (update.metrics, update.logprobs) == ({}, {})
        assert equal(policy.model, before)


def test_the_log_probabilities_are_those_before_the_update():
    policy, members = double(), some()
    wanted = {m.response_id: picked(read(policy.model, m)[1], m).sum().item() for m in members}
    update = optimizer_of(policy, run_config(optimizer={"epochs": 3, "lr": 1e-2})).update(members, 1)
    assert update.logprobs == pytest.approx(wanted, abs=1e-9)
    assert update.metrics["ratio_max"] > 1.5  # the greatest of all epochs


def test_two_runs_and_a_run_that_goes_on_from_its_state_are_equal_to_the_bit(tmp_path):
    config = run_config(
        **{**ALL_ON, "loss": {**ALL_ON["loss"], "kl_target": 1e-9}},
        optimizer={"epochs": 2, "lr": 1e-3, "warmup": 2, "schedule": "cosine"},
    )
    ends = []
    for halt in (False, False, True):
        policy, reference = policy_of(tiny_model()), policy_of(tiny_model(seed=1))
        optimizer = optimizer_of(policy, config, reference)
        for step in (1, 2, 3, 4):
            if halt and step == 3:
                torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
                policy = policy_of(copy.deepcopy(policy.model))
                optimizer = optimizer_of(policy, config, reference)
                optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
            update = optimizer.update(some(seed=step), step)
        ends.append((policy.model, optimizer, update))
    for model, optimizer, update in ends[1:]:
        assert equal(model, ends[0][0])
        assert equal(optimizer.objective.value_head, ends[0][1].objective.value_head)
        assert update == ends[0][2]
        assert optimizer.objective.kl_coef == ends[0][1].objective.kl_coef == 0.1 * 2**4


def test_the_state_of_other_weights_is_one_line():
    optimizer = optimizer_of(policy_of(tiny_model()), run_config())
    other = optimizer_of(policy_of(tiny_model(tied=False)), run_config())
    with pytest.raises(ConfigError, match=r"^the optimizer's state is of other weights: loaded state dict"):
        optimizer.load_state_dict(other.state_dict())


def test_the_coefficient_of_the_kl_moves_towards_its_target():
    for target, factor in ((1e-6, 2), (100.0, 0.5)):
        config = run_config(loss={"kl": "k3", "kl_coef": 0.1, "kl_target": target, "aggregate": "token-mean"})
        optimizer = optimizer_of(policy_of(tiny_model()), config, policy_of(tiny_model(seed=1)))
        for coef in (0.1, 0.1 * factor):
            metrics = optimizer.update(some(), 1).metrics
            assert metrics["kl_coef"] == coef
            assert metrics["loss"] - metrics["policy_loss"] == pytest.approx(coef * metrics["ref_kl"], rel=1e-4)


def test_the_coefficient_of_trpo_goes_by_the_last_epoch():
    loss = {"kl": "trpo", "kl_coef": 0.1, "kl_target": 1e-6}
    optimizer = optimizer_of(policy_of(tiny_model()), run_config(loss=loss, optimizer={"epochs": 2, "lr": 1e-2}))
    optimizer.update(some(), 1)
    assert optimizer.objective.kl_coef == 0.2  # in the first epoch the KL is 0
    with pytest.raises(ConfigError, match=r"^loss.kl_target: kl trpo is 0 in the first epoch"):
        optimizer_of(policy_of(tiny_model()), run_config(loss=loss))


@pytest.mark.parametrize(
    ("kind", "targets"), [("k3", None), ("full", None), ("reward", ["q_proj"]), ("full", ["lm_head", "v_proj"])]
)
def test_adapters_switched_off_are_the_reference(tmp_path, kind, targets):
    """The same steps as with the base model given as a second one."""
    folder = str(tiny_folder(tmp_path, tied=False))
    config = run_config(loss={"kl": kind, "kl_coef": 0.5}, optimizer={"epochs": 2, "lr": 1e-2, "max_grad_norm": 1e9})
    ends = []
    for reference in (None, load_policy(folder)):
        policy = load_policy(folder, lora=Lora(r=2, targets=targets), seed=3)
        base = weights(policy.model)
        optimizer = optimizer_of(policy, config, reference)
        for step in (1, 2):
            update = optimizer.update(some(), step)
        assert update.metrics["ref_kl"] > 1e-3
        now = weights(policy.model)
        assert {name for name in now if not torch.equal(now[name], base[name])} == {n for n in now if "lora_" in n}
        assert all(p.requires_grad == ("lora_" in name) for name, p in policy.model.named_parameters())
        ends.append((policy.model, update))
    assert_close(ends[0][0], ends[1][0], atol=1e-5)
    assert ends[0][1].metrics["ref_kl"] == pytest.approx(ends[1][1].metrics["ref_kl"], abs=1e-5)


def test_a_kl_needs_its_reference():
    with pytest.raises(ValueError, match="no adapters to switch off"):
        optimizer_of(policy_of(tiny_model()), run_config(loss={"kl": "k3", "kl_coef": 0.5}))


def test_trpo_with_adapters_holds_what_the_policy_was(tmp_path):
    policy = load_policy(str(tiny_folder(tmp_path)), lora=Lora(r=2), seed=3)
    config = run_config(loss={"kl": "trpo", "kl_coef": 0.5}, optimizer={"epochs": 2, "lr": 1e-2})
    metrics = optimizer_of(policy, config).update(some(), 1).metrics
    assert metrics["old_kl"] > 1e-4
    assert "ref_kl" not in metrics


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"advantage": math.nan}, "step 7: response 'r5': its advantage is nan: the weights are left as they were"),
        ({"reward": math.inf}, "step 7: response 'r5': its reward is inf: the weights are left as they were"),
        (
            {"rollout_logprobs": (-1.0, -math.inf)},
            "step 7: response 'r5': its rollout_logprobs[1] is -inf: the weights are left as they were",
        ),
        ({"advantage": 1e300}, "step 7: the loss is -inf with response 'r0', 'r1', 'r2' and 5 more: the weights are"),
        ({"advantage": 1e37}, "step 7: the norm of the gradient is inf: the weights are left as they were"),
    ],
)
def test_numbers_that_are_not_finite_never_reach_the_weights(fields, message):
    members = some()
    members[5] = replace(members[5], **fields)
    policy = policy_of(tiny_model())
    optimizer = optimizer_of(policy, run_config(optimizer={"lr": 1e-2}))
    optimizer.update(some(), 6)
    before, state = copy.deepcopy(policy.model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(GrapeError) as error:
        optimizer.update(members, 7)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert equal(policy.model, before)
    assert all(weight.grad is None for weight in policy.model.parameters())
    assert str(optimizer.state_dict()) == str(state)
    optimizer.update(some(), 7)
    assert all(weight.isfinite().all() for weight in policy.model.parameters())


def test_a_response_that_the_policy_cannot_say_is_named():
    model = tiny_model("phi", tied=False)
    with torch.no_grad():
        model.lm_head.bias[50] = -torch.inf
    members = some()
    members[3] = replace(members[3], token_ids=(20, 50, 21))
    others = [member for member in members if 50 not in member.token_ids or member.response_id == "r3"]
    before = copy.deepcopy(model)
    with pytest.raises(GrapeError, match=r"^step 1: the loss is nan with response 'r3': the weights are left as they"):
        optimizer_of(policy_of(model), run_config()).update(others, 1)
    assert equal(model, before)


def test_the_rate_follows_its_schedule():
    def rates(steps, **fields):
        return [schedule(step, steps, OptimizerConfig(**fields)) for step in range(1, steps + 1)]

    assert rates(4) == [1, 1, 1, 1]
    assert rates(5, warmup=2) == [0.5, 1, 1, 1, 1]
    assert rates(4, schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert rates(6, schedule="linear", warmup=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates(4, schedule="cosine") == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])
    assert rates(3, warmup=6) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert schedule(9, 4, OptimizerConfig(schedule="linear")) == 0


def test_the_rate_reaches_the_weights():
    """The first update of AdamW moves every weight by the rate, wherever the gradient is not tiny."""
    config = run_config(optimizer={"lr": 1e-3, "warmup": 4}, value={"lr": 1e-2}, advantage=NO_BASELINE)
    policy = double()
    before, optimizer = weights(policy.model), optimizer_of(policy, config)
    assert optimizer.update(some(), 3).metrics["lr"] == pytest.approx(7.5e-4)
    moved = max((weight - before[name]).abs().max() for name, weight in weights(policy.model).items())
    assert moved.item() == pytest.approx(7.5e-4, rel=1e-3)
    assert optimizer.objective.value_head.bias.abs().item() == pytest.approx(7.5e-3, rel=1e-3)


def test_weight_decay_spares_norms_and_biases():
    policy = policy_of(tiny_model())
    before = weights(policy.model)
    members = [replace(member, advantage=0.0) for member in some()]
    optimizer_of(policy, run_config(optimizer={"lr": 0.1, "weight_decay": 0.5})).update(members, 1)
    for name, weight in policy.model.named_parameters():
        wanted = before[name] * (0.95 if weight.dim() > 1 else 1)
        torch.testing.assert_close(weight, wanted, rtol=1e-6, atol=0, msg=name)


def test_in_bfloat16_small_updates_are_not_lost():
    losses = []
    for dtype in ("float32", "bfloat16"):
        policy = policy_of(tiny_model())
        before = weights(policy.model)
        config = run_config(policy={"model": "m", "dtype": dtype}, optimizer={"lr": 1e-6, "epochs": 2})
        update = optimizer_of(policy, config).update(some(), 1)
        losses.append(update.logprobs["r0"])
        weight = policy.model.model.layers[0].mlp.up_proj.weight
        assert weight.dtype == torch.float32
        moved = (weight - before["model.layers.0.mlp.up_proj.weight"]).abs()
        assert (moved > 5e-7).float().mean() > 0.9  # bfloat16 has no such differences next to 0.1
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.5)
    with pytest.raises(ValueError, match=r"must be in float32, not torch\.bfloat16"):
        optimizer_of(policy_of(tiny_model().bfloat16()), run_config())


@pytest.mark.parametrize("kind", ["none", "k3", "full", "trpo"])
def test_in_bfloat16_the_gradient_is_nearly_the_same(kind):
    norms = []
    for dtype in ("float32", "bfloat16"):
        loss = {"kl": kind, "kl_coef": 2.0} if kind != "none" else {}
        config = run_config(policy={"model": "m", "dtype": dtype}, loss=loss, optimizer={"lr": 1e-3, "epochs": 2})
        policy = policy_of(tiny_model(tied=False))
        optimizer = optimizer_of(policy, config, policy_of(tiny_model(seed=1, tied=False)))
        head = policy.model.lm_head.weight.detach().clone()
        norms.append(optimizer.update(some(), 1).metrics["grad_norm"])
        assert (policy.model.lm_head.weight != head).any()
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_gradient_checkpointing_changes_memory_alone(kind):
    """GPT-2 has dropout of 0.1 in its config: none of it may be on."""
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4} if kind == "gpt2" else {}
    ends = []
    for checkpointing in (False, True):
        kept = []
        policy = policy_of(tiny_model(kind, **shape))
        policy.model.train()  # as somebody may have left it
        sections = {"policy": {**CPU["policy"], "gradient_checkpointing": checkpointing}}
        optimizer = optimizer_of(policy, run_config(**sections, optimizer={"epochs": 2, "lr": 1e-3}))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor.numel()) or tensor, lambda t: t
        ):
            optimizer.update(some(), 1)
        assert policy.model.training
        ends.append((policy.model, sum(kept)))
    assert_close(ends[0][0], ends[1][0], atol=1e-6)
    assert ends[1][1] < 0.1 * ends[0][1]  # of what is kept for the backward pass


def test_gradient_checkpointing_reaches_adapters(tmp_path):
    folder, ends = str(tiny_folder(tmp_path)), []
    for checkpointing in (False, True):
        policy = load_policy(folder, lora=Lora(r=2), seed=3)
        sections = {"policy": {**CPU["policy"], "gradient_checkpointing": checkpointing}}
        optimizer = optimizer_of(policy, run_config(**sections, optimizer={"epochs": 2, "lr": 1e-2}))
        assert optimizer.update(some(), 1).metrics["grad_norm"] > 1
        ends.append(policy.model)
    assert_close(*ends, atol=1e-6)


def test_a_reference_is_measured_where_the_loss_does_not_need_it():
    metrics = optimizer_of(double(), run_config(), double(seed=1)).update(some(), 1).metrics
    tokens = sum(len(member.token_ids) for member in some())
    wanted = 0.0
    for member in some():
        new, ref = (picked(read(double(seed).model, member)[1], member) for seed in (0, 1))
        wanted += ((ref - new).exp() - 1 - (ref - new)).sum().item() / tokens
    assert metrics["ref_kl"] == pytest.approx(wanted, abs=1e-9)
    assert metrics["policy_loss"] == metrics["loss"]
    assert metrics["kl_coef"] == 0


def test_dropout_that_checkpointing_would_switch_on_is_one_line():
    policy = policy_of(tiny_model("opt", ffn_dim=128, word_embed_proj_dim=64, dropout=0.3))
    sections = {"policy": {**CPU["policy"], "gradient_checkpointing": True}}
    with pytest.raises(ConfigError, match=r"^policy.gradient_checkpointing: OPTForCausalLM cannot do without dropout"):
        optimizer_of(policy, run_config(**sections))


def test_the_dropout_of_adapters_is_drawn_from_seed_and_step(tmp_path):
    folder = str(tiny_folder(tmp_path))

    def trained(seed, step, dropout=0.5):
        policy = load_policy(folder, lora=Lora(r=2, dropout=dropout), seed=3)
        with torch.no_grad():
            for name, weight in policy.model.named_parameters():
                if "lora_B" in name:
                    weight.fill_(0.01)
        config = run_config(seed=seed, optimizer={"lr": 1e-2})
        before = torch.get_rng_state()
        update = optimizer_of(policy, config).update(some(), step)
        assert torch.equal(torch.get_rng_state(), before)
        assert not any(module.training for module in policy.model.modules())
        return update.metrics["entropy"]

    assert trained(1, 1) == trained(1, 1)
    assert len({trained(1, 1), trained(2, 1), trained(1, 2), trained(1, 1, dropout=0.0)}) == 4


def test_penalties_in_the_rewards_of_sequences_see_the_dropout_of_the_update():
    """It is drawn from the seed and the step, whatever was drawn before, so that a run that goes on does as well."""

    def trained(drawn):
        model = add_lora(tiny_model("gpt_neox"), Lora(r=2, dropout=0.5), seed=3)
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.constant_(weight, 0.02)
        loss = {"kl": "reward", "kl_coef": 0.5, "ratio": "sequence-mean"}
        torch.manual_seed(drawn)
        return optimizer_of(policy_of(model), run_config(loss=loss, optimizer=SHARP)).update(some(), 1).metrics

    assert trained(0) == trained(1)


def parts():
    """What each of two processes trains on: uneven, and a third of them masked."""
    members = [replace(member, trained=number % 3 < 2) for number, member in enumerate(some(12))]
    return members[:4], members[4:]


CONFIGS = [ALL_ON, {"loss": {"kl": "reward", "kl_coef": 0.1, "ratio": "sequence-mean"}}]


def two_updates(share, number):
    config = run_config(**CONFIGS[number], optimizer={**SHARP, "epochs": 2})
    policy = double()
    optimizer = optimizer_of(policy, config, double(seed=1))
    metrics = [optimizer.update(members, step).metrics for step, members in enumerate(share, 1)]
    return policy.model, metrics


@pytest.mark.slow
def test_two_processes_make_the_update_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": str(Path(tiny.__file__).parent)}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path)], env={**shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    ours, theirs = parts()
    for number in range(len(CONFIGS)):
        model, metrics = two_updates([[*ours, *theirs], theirs], number)
        for rank in ("0", "1"):
            there = torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True)
            for name, weight in weights(model).items():
                torch.testing.assert_close(there["weights"][name], weight, rtol=0, atol=1e-6, msg=name)
            for one, other in zip(there["metrics"], metrics, strict=True):
                assert one.keys() == other.keys()
                for name in one.keys() - {"computed"}:
                    assert one[name] == pytest.approx(other[name], abs=1e-6), name
    assert (tmp_path / "0.txt").read_text() == "step 3: another process has numbers that are not finite"
    assert (tmp_path / "1.txt").read_text().startswith("step 3: response 'r4': its advantage is nan")


def one_rank(folder):
    """What each process of that test does; in the second step the first of them has no members."""
    rank = int(os.environ["RANK"])
    for number in range(len(CONFIGS)):
        share = [parts()[rank], [[], parts()[1]][rank]]
        model, metrics = two_updates(share, number)
        torch.save({"weights": weights(model), "metrics": metrics}, folder / f"{number}-{rank}.pt")
    optimizer = optimizer_of(double(), run_config())
    bad = parts()[rank] if rank == 0 else [replace(parts()[1][0], advantage=math.nan)]
    try:
        optimizer.update(bad, 3)
    except GrapeError as error:
        (folder / f"{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
