"""Packed rows, with the prompt of a group computed once, give what padded rows give, and their gradients."""

from __future__ import annotations

import random
from itertools import groupby

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_model, tiny_tokenizer

from grape.adapters import add_lora
from grape.attention import Blocks, packed_attention, switched, varlen
from grape.config import Lora, parse_run
from grape.member import Member
from grape.modes import Modes
from grape.optimize import Optimizer
from grape.packing import Packing, packed, packs, padded, reach
from grape.policy import Policy, hidden_states


def groups(*sizes, prompt=12, response=9, seed=0):
    """Rows in groups of so many that share a prompt; lengths from 1."""
    draw = random.Random(seed)

    def tokens(limit):
        return tuple(draw.randrange(3, 90) for _ in range(draw.randrange(1, limit + 1)))

    prompts = [tokens(prompt) for _ in sizes]
    return [(given, tokens(response)) for given, size in zip(prompts, sizes, strict=True) for _ in range(size)]


def shared(rows):
    """Neighbours with one prompt as runs."""
    return [list(run) for _, run in groupby(rows, key=lambda row: row[0])]


ROWS = groups(4, 1, 3)
RUNS = {True: shared(ROWS), False: [[row] for row in ROWS]}


def backward(model, text, weight):
    model.zero_grad()
    states = text.states(model)
    (states * weight.to(states)).sum().backward()
    return states.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("kind", "dtype", "tolerance"), [
    ("gpt_neox", torch.float64, 1e-13), ("qwen3", torch.float32, 1e-5), ("llama", torch.float32, 1e-5),
])  # fmt: skip
def test_states_and_gradients_are_those_of_padded_rows(kind, dtype, tolerance, share):
    model = tiny_model(kind).to(dtype)
    weight = torch.randn(sum(len(given) for _, given in ROWS), 64, generator=torch.Generator().manual_seed(0))
    wanted, grads = backward(model, padded(ROWS, 0, "cpu"), weight)
    with switched(model):
        found, ours = backward(model, packed(RUNS[share]), weight)
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    assert ours.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(ours[name], grad, rtol=0, atol=tolerance * float(grad.abs().max()), msg=name)


def test_gradients_reach_the_prompt_from_each_response():
    """The same group, its prompt once: what one response sends back to the prompt is not lost to the others."""
    model, rows = tiny_model("gpt_neox").double(), groups(3, prompt=8, seed=3)
    total = torch.zeros(99, 64, dtype=torch.float64)
    for row in rows:
        with switched(model):
            total += backward(model, packed([[row]]), torch.ones(1))[1]["gpt_neox.embed_in.weight"]
    with switched(model):
        together = backward(model, packed(shared(rows)), torch.ones(1))[1]["gpt_neox.embed_in.weight"]
    torch.testing.assert_close(together, total, rtol=0, atol=1e-12)


def test_what_is_packed():
    rows = [((1, 2), (5, 6, 7)), ((1, 2), (8,)), ((1, 2), (4, 9)), ((3,), (1, 2))]
    text = packed(shared(rows))
    assert text.ids_1T.tolist() == [[1, 2, 5, 6, 4, 3, 1]]  # last tokens predict nothing
    assert text.positions_1T.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert text.before_N.tolist() == [1, 2, 3, 1, 1, 4, 5, 6]
    assert text.blocks.own == ((0, 2), (2, 4), (4, 5), (5, 7))
    assert text.blocks.shared == ((2, 5, 0, 2),)
    assert text.blocks.longest == 4
    apart = packed([[row] for row in rows])
    assert len(apart) == len(text) + 4
    assert (apart.blocks.own, apart.blocks.shared) == (((0, 4), (4, 6), (6, 9), (9, 11)), ())
    ends = packed([[((1, 2), (5,)), ((1, 2), (6,))]])
    assert (ends.blocks.own, ends.blocks.shared, ends.before_N.tolist()) == (((0, 2),), (), [1, 1])


def by_rows(query, key, value, begin_q, begin_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
    """A kernel for rows of any length in plain torch: causal from the end of both, as the one on CUDA is."""
    assert window_size == (-1, 0)
    assert enable_gqa
    outs = []
    for q0, q1, k0, k1 in zip(begin_q, begin_q[1:], begin_k, begin_k[1:], strict=False):
        assert q1 - q0 <= longest_q
        assert k1 - k0 <= longest_k
        keys, values = (
            x[k0:k1].repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(0, 1) for x in (key, value)
        )
        scores = query[q0:q1].transpose(0, 1) @ keys.transpose(1, 2) * scale
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(int((k1 - k0) - (q1 - q0)))
        outs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outs)


def test_the_rows_for_a_varlen_kernel_are_those_of_the_joined_parts():
    """What CUDA is given, by a kernel that runs here."""
    blocks = packed(RUNS[True]).blocks
    total = blocks.own[-1][1]
    draw = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(1, heads, total, 16, dtype=torch.float64, generator=draw, requires_grad=True) for heads in (4, 2, 2)
    )
    joined = packed_attention(torch.nn.Identity(), query, key, value, None, packed=blocks, scaling=0.3)[0][0]
    rows = varlen(query, key, value, blocks, 0.3, kernel=by_rows)
    torch.testing.assert_close(joined, rows, rtol=0, atol=1e-12)
    weight = torch.randn(joined.shape, dtype=torch.float64, generator=draw)
    pairs = [torch.autograd.grad((out * weight).sum(), (query, key, value)) for out in (joined, rows)]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "options", "expected"), [
    ("qwen3", {}, True), ("llama", {}, True), ("gpt2", {}, True), ("gemma3_text", {}, True), ("mistral", {}, True),
    ("gemma2", {}, False),  # caps its scores
    ("gpt_oss", {}, False),  # has sinks
    ("bloom", {}, False),  # tells positions by the mask
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, False),  # a convolution runs on into the next row
    ("mistral", {"sliding_window": 4}, False),  # sees less than a row
    ("minimax_m3_vl_text", {
        "layer_types": ["minimax_m3_sparse", "full_attention"], "index_n_heads": 2, "index_head_dim": 16,
        "num_local_experts": 2, "num_experts_per_tok": 1,
    }, False),  # sees chosen keys of a row that is longer than these
])  # fmt: skip
def test_which_models_take_packed_rows(kind, options, expected):
    assert packs(tiny_model(kind, **options)) is expected


def test_rows_beyond_a_window_are_padded():
    model = tiny_model("mistral", sliding_window=10)
    assert reach(model) == 10
    packing = Packing(model, 0)
    assert packing.packs
    members = [member(0, (5,) * 6, (7,) * 4), member(1, (5,) * 6, (7,) * 3)]
    assert [len(batch.text) for batch in packing.batches(members, 100)] == [6 + 3 + 2]
    members.append(member(2, (5,) * 6, (7,) * 5))
    (batch,) = packing.batches(members, 100)
    assert len(batch.text) == 33  # three rows of 11
    states, blocks = torch.zeros(1, 2, 10, 4), Blocks(own=((0, 10),), shared=())
    with pytest.raises(NotImplementedError, match="no window: of 10 tokens all are seen"):
        packed_attention(model, states, states, states, None, packed=blocks, sliding_window=9)


def test_outside_of_an_update_the_model_attends_as_ever():
    model = tiny_model()
    ids, attended = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
    before = hidden_states(model, ids, attended).last_hidden_state
    name = model.config._attn_implementation
    with switched(model):
        assert model.config._attn_implementation == "grape"
    assert model.config._attn_implementation == name
    assert torch.equal(hidden_states(model, ids, attended).last_hidden_state, before)


def member(number, prompt, tokens, **fields):
    plain = {
        "response_id": f"r{number}", "group": "g", "prompt_ids": prompt, "token_ids": tokens, "rollout_logprobs": None,
        "advantage": (number % 3) - 1.0, "reward": 0.0, "trained": True, "off_policy": False,
    }  # fmt: skip
    return Member(**{**plain, **fields})


def test_siblings_are_together_as_far_as_the_budget_goes():
    packing = Packing(tiny_model(), 0)
    members = [member(n, ((1, 2, 3, 4), (9, 9))[n % 2], (5,) * 3) for n in range(6)]
    cut = [[one.response_id for one in batch.members] for batch in packing.batches(members, 1000)]
    assert cut == [["r0", "r2", "r4", "r1", "r3", "r5"]]
    batches = packing.batches(members, 8)  # a prompt of 4 and two of its responses, without their last tokens
    assert [[one.response_id for one in batch.members] for batch in batches] == [
        ["r0", "r2"],
        ["r4"],
        ["r1", "r3", "r5"],
    ]
    assert [len(batch.text) for batch in batches] == [8, 6, 8]
    assert [len(batch.text) for batch in packing.batches(members, 1)] == [6, 6, 6, 4, 4, 4]
    assert packing.batches([], 8) == []


def test_a_prompt_is_shared_where_that_pays():
    packing = Packing(tiny_model(), 0)
    for prompt, given, expected in ((1, 20, False), (2, 20, False), (3, 20, True), (40, 2, True)):
        members = [member(n, (5,) * prompt, (7,) * given) for n in range(4)]
        (batch,) = packing.batches(members, 1000)
        assert len(batch.text) == (prompt if expected else 4 * prompt) + 4 * (given - 1), prompt
        assert bool(batch.text.blocks.shared) is expected
        assert [len(cut.text) for cut in packing.batches(members, 1)] == [prompt + given - 1] * 4
    assert not packing.batches([member(0, (5,) * 40, (7,))], 100)[0].text.blocks.shared


def config(**sections):
    return parse_run({"policy": {"model": "m", "dtype": "float32"}, "questions": {"path": "q"}, **sections}, "run")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_is_the_same_with_shared_prompts_and_without(checkpointing):
    """Two steps of two epochs with a reference, in float64."""
    results = []
    for share in (True, False, None):
        model, reference = (tiny_model("gpt_neox", seed=seed).double() for seed in (0, 1))
        policy, other = (
            Policy(model=m, tokenizer=tiny_tokenizer(), stop_ids=(1,), pad_id=0) for m in (model, reference)
        )
        run = config(
            loss={"kl": "k3", "kl_coef": 0.1}, optimizer={"epochs": 2, "lr": 1e-3},
            policy={"model": "m", "dtype": "float32", "gradient_checkpointing": checkpointing},
        )  # fmt: skip
        optimizer = Optimizer(policy, run, Accelerator(cpu=True), reference=other)
        optimizer.packing = Packing(model, 0, share=bool(share))
        if share is None:
            optimizer.packing.packs = False
        members = [member(n, prompt, given) for n, (prompt, given) in enumerate(groups(4, 4, 2, seed=5))]
        updates = [optimizer.update(members, step) for step in (1, 2)]
        results.append((model.state_dict(), updates))
    for state, updates in results[1:]:
        for name, weight in results[0][0].items():
            torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-7, msg=name)
        for one, two in zip(updates, results[0][1], strict=True):
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-7)
            for name in one.metrics.keys() - {"computed"}:
                assert one.metrics[name] == pytest.approx(two.metrics[name], abs=1e-7), name
    computed = [updates[0].metrics["computed"] for _, updates in results]
    assert computed[0] < computed[1] < 1 < computed[2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_with_a_row_beyond_a_window_is_that_of_padded_rows(checkpointing):
    members, results = [member(n, prompt, given) for n, (prompt, given) in enumerate(groups(4, 2, seed=5))], []
    assert max(map(len, members)) > 10
    for packs_ in (True, False):
        policy = Policy(
            model=tiny_model("mistral", sliding_window=10), tokenizer=tiny_tokenizer(), stop_ids=(1,), pad_id=0
        )
        run = config(policy={"model": "m", "dtype": "float32", "gradient_checkpointing": checkpointing})
        optimizer = Optimizer(policy, run, Accelerator(cpu=True))
        assert optimizer.packing.packs
        optimizer.packing.packs = packs_
        results.append(optimizer.update(members, 1))
    assert results[0] == results[1]


@pytest.mark.parametrize(("kind", "options"), [
    ("lfm2", {"layer_types": ["conv", "full_attention"]}),  # would give other numbers
    ("stablelm", {}),  # would fail
    ("mistral", {"sliding_window": 10}),  # takes packed rows, but not the longest
])  # fmt: skip
def test_a_reference_that_takes_no_packed_rows_gets_padded_ones(kind, options):
    members = [member(n, prompt, given) for n, (prompt, given) in enumerate(groups(4, 2, seed=5))]
    assert max(map(len, members)) > 10
    kls = []
    for packs_ in (True, False):
        policy, other = (
            Policy(model=m, tokenizer=tiny_tokenizer(), stop_ids=(1,), pad_id=0)
            for m in (tiny_model(), tiny_model(kind, seed=1, **options))
        )
        run = config(loss={"kl": "k3", "kl_coef": 0.1})
        optimizer = Optimizer(policy, run, Accelerator(cpu=True), reference=other)
        optimizer.packing.packs &= packs_
        kls.append(optimizer.update(members, 1).metrics["ref_kl"])
    assert kls[0] == pytest.approx(kls[1], rel=1e-5)


def test_a_response_that_was_drawn_elsewhere_keeps_its_place():
    batch = Packing(tiny_model(), 0).batches(
        [member(0, (3, 4), (5, 6, 7)), member(1, (3, 4), (8, 9), rollout_logprobs=(-1.0, -2.0), off_policy=True)], 99
    )[0]
    assert batch.mask_BT.tolist() == [[True] * 3, [True, True, False]]
    assert batch.labels_N.tolist() == [5, 6, 7, 8, 9]
    assert batch.rollout_BT[1].tolist()[:2] == [-1.0, -2.0]
    assert batch.rollout_BT.isnan().sum() == 4


def test_bfloat16_arithmetic_is_near():
    model = tiny_model()
    wanted = padded(ROWS, 0, "cpu").states(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), switched(model):
        found = packed(RUNS[True]).states(model)
    assert (found - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def test_lora_and_its_dropout_pass_through():
    model = add_lora(tiny_model(), Lora(r=4, dropout=0.5), seed=0)
    assert packs(model)
    modes = Modes(model, False)
    text = packed(RUNS[True])
    with modes.training(), switched(model):
        with modes.seeded(1):
            one = text.states(model)
        with modes.seeded(1):
            two = text.states(model)
    assert torch.equal(one, two)


def test_nothing_that_attention_cannot_do_passes_unseen():
    states = torch.zeros(1, 2, 3, 4)
    blocks = Blocks(own=((0, 3),), shared=())
    with pytest.raises(NotImplementedError, match="packed attention has no softcap, indices"):
        packed_attention(
            torch.nn.Identity(), states, states, states, None, packed=blocks, softcap=30.0, indices=states, rest=None
        )
    with pytest.raises(NotImplementedError, match="packed attention has no mask"):
        packed_attention(torch.nn.Identity(), states, states, states, torch.zeros(1, 1, 3, 3), packed=blocks)
