"""Sampling: exact log-probabilities, the same bits from the same seed, and nothing computed twice."""

from __future__ import annotations

import math
import queue
import threading
from dataclasses import replace

import pytest
import torch
from tiny import tiny_policy
from transformers.cache_utils import DynamicLayer

from grape.cache import Held, Rows
from grape.errors import ConfigError, GrapeError
from grape.logprobs import pad, response_logprobs
from grape.policy import hidden_states, load_policy, save_policy
from grape.rollout import Rollout, Sampling, draw, sample, truncate

PROMPTS = [[20, 21, 22, 23, 24, 25], [30], [40, 41, 42]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    return tiny_policy(tmp_path_factory.mktemp("windowed"), "mistral", sliding_window=6)


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A cache of a kind of its own, with states beside the layers."""
    kinds = {"layer_types": ["full_attention", "linear_attention"], "num_local_experts": 2, "num_experts_per_tok": 1}
    return tiny_policy(tmp_path_factory.mktemp("linear"), "minimax", **kinds)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def trainer_logprobs(policy, rollouts, prompts=PROMPTS):
    batch = pad([prompts[r.group] for r in rollouts], [r.token_ids for r in rollouts], policy.pad_id)
    with torch.no_grad():
        logprobs_BT, _ = response_logprobs(policy.model, *batch)
    return [row[mask].tolist() for row, mask in zip(logprobs_BT, batch[2], strict=True)]


@pytest.mark.parametrize("which", ["policy", "windowed", "linear"])
def test_logprobs_are_those_of_the_trainers_forward(which, request):
    policy = request.getfixturevalue(which)
    rollouts = sample(policy, PROMPTS, responses=8, max_tokens=30, generator=seeded())
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for rollout, truth in zip(rollouts, trainer_logprobs(policy, rollouts), strict=True):
        assert rollout.logprobs == pytest.approx(truth, abs=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(policy):
    first = sample(policy, PROMPTS, responses=4, max_tokens=20, generator=seeded(5))
    assert sample(policy, PROMPTS, responses=4, max_tokens=20, generator=seeded(5)) == first
    assert sample(policy, PROMPTS, responses=4, max_tokens=20, generator=seeded(6)) != first


def test_only_the_generator_is_drawn_from(policy):
    before = torch.get_rng_state()
    sample(policy, PROMPTS, responses=2, max_tokens=5, generator=seeded())
    sample(policy, PROMPTS, responses=2, max_tokens=5, sampling=Sampling(temperature=0, training=False))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("which", ["policy", "windowed"])
def test_greedy_is_generate_of_transformers(which, request):
    policy = request.getfixturevalue(which)
    rollouts = sample(policy, PROMPTS, responses=1, max_tokens=40, sampling=Sampling(temperature=0, training=False))
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        out = policy.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
        assert list(rollout.token_ids) == out[0, len(prompt) :].tolist()


def test_tokens_are_drawn_in_proportion_to_the_policys_probabilities(policy):
    rollouts = sample(policy, [PROMPTS[2]], responses=20000, max_tokens=1, generator=seeded(1))
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in rollouts]), minlength=99)
    with torch.no_grad():
        probs = policy.model(torch.tensor([PROMPTS[2]])).logits[0, -1].softmax(-1)
    sure = probs > 5e-4
    z = (counts / 20000 - probs) / (probs * (1 - probs) / 20000).sqrt()
    assert z[sure].abs().max() < 5
    assert 0.8 < z[sure].pow(2).mean() < 1.4


def test_rows_are_in_order_and_end_where_they_should(policy):
    counts = [3, 0, 5]
    rollouts = sample(policy, PROMPTS, responses=counts, max_tokens=25, generator=seeded(3))
    assert [(r.group, r.member) for r in rollouts] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4)]
    for rollout in rollouts:
        stops = [token in policy.stop_ids for token in rollout.token_ids]
        assert not any(stops[:-1])
        assert rollout.finish == ("stop" if stops[-1] else "length")
        assert stops[-1] or len(stops) == 25
        assert len(rollout.logprobs) == len(rollout.token_ids)
        assert rollout.text == policy.tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
        assert "<|end|>" not in rollout.text
    assert sample(policy, PROMPTS, responses=0, max_tokens=5) == []
    assert sample(policy, [], responses=4, max_tokens=5) == []


def test_a_prompt_is_computed_once_and_finished_rows_are_computed_no_more(policy):
    shapes = []
    hook = policy.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        rollouts = sample(policy, PROMPTS, responses=16, max_tokens=30, generator=seeded())
    finally:
        hook.remove()
    lengths = [len(r.token_ids) for r in rollouts]
    assert shapes[0] == (3, 6)  # not 48 rows
    assert shapes[1:] == [(sum(n > step for n in lengths), 1) for step in range(1, 30)]
    assert shapes[-1][0] < 48


def test_a_neighbour_changes_no_greedy_response(policy):
    greedy = Sampling(temperature=0, training=False)
    together = sample(policy, PROMPTS, responses=1, max_tokens=30, sampling=greedy)
    for group, prompt in enumerate(PROMPTS):
        alone = sample(policy, [prompt], responses=1, max_tokens=30, sampling=greedy)[0]
        assert alone.token_ids == together[group].token_ids
        assert alone.logprobs == pytest.approx(together[group].logprobs, abs=1e-5)


def test_each_response_is_handed_over_once_and_while_others_are_being_sampled(policy):
    steps, seen = [], []
    hook = policy.model.model.register_forward_pre_hook(lambda module, args: steps.append(1))

    def on_response(rollout):
        seen.append((rollout, len(steps)))

    try:
        rollouts = sample(policy, PROMPTS, responses=16, max_tokens=30, generator=seeded(), on_response=on_response)
    finally:
        hook.remove()
    assert sorted(((r.group, r.member) for r, _ in seen)) == [(r.group, r.member) for r in rollouts]
    assert {id(r) for r, _ in seen} == {id(r) for r in rollouts}
    assert [step for _, step in seen] == [len(r.token_ids) for r, _ in seen]  # at the step at which it ended
    assert seen[0][1] < len(steps) == 30


def test_a_queue_brings_responses_to_another_thread(policy):
    inbox, scored = queue.SimpleQueue(), []

    def score():
        while (rollout := inbox.get()) is not None:
            scored.append((rollout.group, rollout.member))

    thread = threading.Thread(target=score)
    thread.start()
    try:
        rollouts = sample(policy, PROMPTS, responses=4, max_tokens=10, generator=seeded(), on_response=inbox.put)
    finally:
        inbox.put(None)
        thread.join()
    assert sorted(scored) == [(r.group, r.member) for r in rollouts]


def test_a_failing_callback_ends_the_sampling_and_leaves_the_model_as_it_was(policy):
    def fail(rollout: Rollout) -> None:
        raise KeyError(rollout.group)

    policy.model.train()
    policy.model.lm_head.eval()
    try:
        with pytest.raises(KeyError):
            sample(policy, PROMPTS, responses=2, max_tokens=3, on_response=fail)
        modes = {name: module.training for name, module in policy.model.named_modules()}
        assert [name for name, mode in modes.items() if not mode] == ["lm_head"]
    finally:
        policy.model.eval()


def test_dropout_and_gradient_checkpointing_do_not_reach_sampling(tmp_path):
    policy = tiny_policy(tmp_path, attention_dropout=0.5)
    calm = sample(policy, PROMPTS, responses=4, max_tokens=10, generator=seeded())
    policy.model.gradient_checkpointing_enable()
    policy.model.train()
    assert sample(policy, PROMPTS, responses=4, max_tokens=10, generator=seeded()) == calm
    assert policy.model.training


def test_adapters_are_sampled_from(tmp_path):
    from grape.config import Lora

    base = tiny_policy(tmp_path / "base")
    policy = load_policy(str(tmp_path / "base"), lora=Lora(r=4))
    fresh = sample(policy, PROMPTS, responses=2, max_tokens=10, generator=seeded())
    assert [r.token_ids for r in fresh] == [
        r.token_ids for r in sample(base, PROMPTS, responses=2, max_tokens=10, generator=seeded())
    ]
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.5, generator=seeded(9))
    moved = sample(policy, PROMPTS, responses=2, max_tokens=10, generator=seeded())
    for rollout, truth in zip(moved, trainer_logprobs(policy, moved), strict=True):
        assert rollout.logprobs == pytest.approx(truth, abs=1e-4)
    assert [r.token_ids for r in moved] != [r.token_ids for r in fresh]
    save_policy(policy, tmp_path / "adapters")
    again = load_policy(str(tmp_path / "adapters"))
    assert sample(again, PROMPTS, responses=2, max_tokens=10, generator=seeded()) == moved


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.7}, "sampling.temperature: training needs 1.0, samples of the policy itself (got 0.7)"),
        ({"temperature": 0}, "sampling.temperature: training needs 1.0, samples of the policy itself (got 0)"),
        ({"top_p": 0.9}, "sampling.top_p: training needs 1.0, samples of the policy itself (got 0.9)"),
        ({"top_k": 20}, "sampling.top_k: training needs 0, samples of the policy itself (got 20)"),
        ({"min_p": 0.1}, "sampling.min_p: training needs 0.0, samples of the policy itself (got 0.1)"),
        ({"temperature": -1, "training": False}, "sampling.temperature: must be finite and at least 0 (got -1)"),
        ({"temperature": float("nan")}, "sampling.temperature: must be finite and at least 0 (got nan)"),
        ({"top_p": 0, "training": False}, "sampling.top_p: must be above 0 and at most 1 (got 0)"),
        ({"top_k": -1, "training": False}, "sampling.top_k: must be at least 0 (got -1)"),
        ({"min_p": 1.5, "training": False}, "sampling.min_p: must be from 0 to 1 (got 1.5)"),
    ],
)
def test_settings_that_would_bias_training_are_refused(setting, message):
    with pytest.raises(ConfigError) as error:
        Sampling(**setting)
    assert str(error.value) == message


def test_truncation_keeps_the_head_of_the_distribution():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])

    def kept(**setting):
        return (truncate(probs, Sampling(training=False, **setting))[0] > 0).tolist()

    assert kept() == [True, True, True, True]
    assert kept(top_k=2) == [False, True, False, True]
    assert kept(top_k=9) == [True, True, True, True]
    assert kept(top_p=0.65) == [False, True, False, True]
    assert kept(top_p=0.75) == [False, True, True, True]
    assert kept(top_p=0.01) == [False, True, False, False]
    assert kept(min_p=0.5) == [False, True, True, True]
    assert kept(top_k=3, top_p=0.5) == [False, True, False, True]


def test_evaluation_at_another_temperature_still_gives_the_policys_own_logprobs(policy):
    for setting in (Sampling(temperature=0.5, top_p=0.9, training=False), Sampling(temperature=1e-300, training=False)):
        rollouts = sample(policy, PROMPTS, responses=2, max_tokens=10, generator=seeded(), sampling=setting)
        for rollout, truth in zip(rollouts, trainer_logprobs(policy, rollouts), strict=True):
            assert rollout.logprobs == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0, training=False)])
def test_a_policy_that_gives_no_numbers_is_one_line(value, sampling, tmp_path):
    policy = tiny_policy(tmp_path)
    policy.model.model.norm.weight.data[3] = value
    with pytest.raises(GrapeError, match="the policy gives no numbers: its weights or activations are not finite"):
        sample(policy, PROMPTS, responses=2, max_tokens=3, sampling=sampling)


def test_a_uniform_number_is_a_place_in_the_cumulative_distribution():
    probs_RV = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    below = {0.0: 1, 0.2499999: 1, 0.2500001: 3, 0.7499999: 3, 0.7500001: 4, 1 - 2**-53: 4}
    for number, token in below.items():
        uniform_R = torch.tensor([number], dtype=torch.float64)
        tokens_R, logprobs_R = draw(probs_RV.log(), Sampling(), uniform_R)
        assert tokens_R.tolist() == [token]
        assert logprobs_R.item() == pytest.approx(math.log(probs_RV[0, token]), abs=1e-6)


def test_no_token_is_too_rare_for_a_uniform_number():
    logits_RV = torch.full((1, 20_000), -18.0)  # 1.5e-8 each beside the first: numbers of float32 are 6e-8 apart
    logits_RV[0, 0] = 0.0
    uniform_R = torch.linspace(0.9999, 0.99991, 101, dtype=torch.float64)
    tokens_R, _ = draw(logits_RV.expand(101, -1), Sampling(), uniform_R)
    steps = tokens_R.diff()
    assert steps.min() >= 6 and steps.max() <= 7  # 1e-7 of the distribution each


def test_keys_and_values_that_stay_in_place_are_those_of_transformers_own_cache():
    generator = seeded(4)
    plain = DynamicLayer()
    plain.update(*torch.randn(2, 3, 2, 5, 4, generator=generator))
    rows_R, places = torch.tensor([0, 0, 1, 2, 2, 2]), set()
    held = Held(plain, rows_R, 405)
    plain.batch_select_indices(rows_R)
    moments = {7: ({1: 4, 3: 5}, [0, 4, 2, 5]), 9: ({}, [0, 1, 2]), 150: ({0: 2}, [2, 1]), 390: ({0: 1}, [1])}
    for moment in range(400):
        if moment in moments:
            moves, order = moments[moment]
            held.move(moves, len(order))
            plain.batch_select_indices(torch.tensor(order))
        new = torch.randn(2, len(plain.keys), 2, 1, 4, generator=generator)
        wanted, found = plain.update(*new), held.update(*new)
        assert all(map(torch.equal, found, wanted))
        places.add(found[0].data_ptr())
    assert held.get_seq_length() == 405
    assert len(places) <= 4  # of 400 tokens
    assert found[0].untyped_storage().size() == 4 * 2 * 2 * 405 * 4  # the limit, and the rows that were there last time


@pytest.mark.parametrize(("which", "takes_masks"), [("policy", True), ("policy", False), ("windowed", False)])
@pytest.mark.parametrize("prompts", [PROMPTS, [[7, 8], [9, 10], [11, 12]]])  # with padding and without
def test_rows_go_on_as_each_would_alone(which, takes_masks, prompts, request):
    policy = request.getfixturevalue(which)
    assert policy.takes_masks == (which == "policy")  # a window has a mask of its own
    generator, places = seeded(8), [0, 0, 1, 2, 2, 2]
    with torch.no_grad():
        rows = Rows(replace(policy, takes_masks=takes_masks), prompts, places, 140)
        texts = [list(prompts[place]) for place in places]
        moments = {3: [0, 2, 3, 5], 5: [0, 1, 2], 20: [1, 2], 135: [1]}  # holes, the last, the first, the last but one
        for moment in range(139):
            if moment in moments:
                order, order_R = rows.keep(moments[moment])
                assert sorted(order) == moments[moment]
                assert order_R.tolist() == order
                texts = [texts[row] for row in order]
            ids_R = torch.randint(3, 90, (len(texts),), generator=generator)
            rows.step(ids_R)
            texts = [[*text, token] for text, token in zip(texts, ids_R.tolist(), strict=True)]
            if moment in (0, 3, 4, 6, 25, 137, 138):
                for text, state_H in zip(texts, rows.state_RH, strict=True):
                    ids_BT = torch.tensor([text])
                    alone = hidden_states(policy.model, ids_BT, torch.ones_like(ids_BT)).last_hidden_state[0, -1]
                    torch.testing.assert_close(state_H, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_response_ends_where_rope_would_begin_to_depend_on_its_neighbours(tmp_path, kind):
    factors = {"long_factor": [2.0] * 8, "short_factor": [1.0] * 8} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64} | factors
    policy = tiny_policy(tmp_path, max_position_embeddings=256, rope_parameters=rope)
    assert len(sample(policy, [[5, 6]], responses=1, max_tokens=62, generator=torch.Generator())) == 1
    with pytest.raises(ConfigError, match="63 after a prompt of 2 tokens exceed the model's 64 positions"):
        sample(policy, [[5, 6]], responses=1, max_tokens=63, generator=torch.Generator())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_tokens": 0}, ConfigError, "sampling.max_tokens: must be at least 1 (got 0)"),
        (
            {"max_tokens": 507},
            ConfigError,
            "sampling.max_tokens: 507 after a prompt of 6 tokens exceed the model's 512 positions",
        ),
        ({"prompts": [[5], []]}, ValueError, "a prompt has no tokens"),
        ({"responses": [1, 2]}, ValueError, "responses must be one count of at least 0 for each prompt"),
        ({"responses": -1}, ValueError, "responses must be one count of at least 0 for each prompt"),
    ],
)
def test_what_cannot_be_sampled_is_refused(policy, change, error, message):
    call = {"prompts": PROMPTS, "responses": 2, "max_tokens": 5, **change}
    with pytest.raises(error) as raised:
        sample(policy, **call)
    assert str(raised.value) == message
