"""Log-probabilities of tokens: those of the full logits in values and gradients, by whatever way they are made."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_optimize import optimizer_of, policy_of, run_config, some
from tiny import tiny_folder, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from grape import head as way
from grape.config import Lora
from grape.head import Other, plain_head, token_logprobs
from grape.linear_head import linear_logprobs
from grape.policy import load_policy, logits

N, H, V = 23, 64, 99  # V is that of `tiny_model`


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tokens(dtype=torch.float32, count=N, size=V):
    labels_N = torch.randint(0, size, (count,), generator=torch.Generator().manual_seed(1))
    return 2 * draw(count, H, dtype=dtype), labels_N


def full(head, states_NH, labels_N):
    """Log-probabilities and entropies from all logits."""
    logprobs_NV = head(states_NH).log_softmax(-1)
    finite_NV = logprobs_NV.clamp(min=torch.finfo(logprobs_NV.dtype).min)
    return logprobs_NV.gather(-1, labels_N[:, None]).squeeze(-1), -(logprobs_NV.exp() * finite_NV).sum(-1)


def slopes_of(dtype=torch.float32):
    """The gradients of `total` by log-probabilities and entropies; a third of the tokens have none."""
    by_N = draw(N, seed=2, dtype=dtype)
    by_N[5:13] = 0
    return by_N, draw(N, seed=3, dtype=dtype)


def total(values, entropy):
    by_N, entropy_by_N = slopes_of(values[0].dtype)
    return (values[0] * by_N).sum() + ((values[1] * entropy_by_N).sum() if entropy else 0)


def graded(model, run, states_NH, *, entropy):
    """Values and gradients by states and the head's weights; ``run`` makes the values of states."""
    states_NH = states_NH.clone().requires_grad_()
    model.zero_grad()
    values = run(states_NH)
    total(values, entropy).backward()
    weights = [weight for weight in model.get_output_embeddings().parameters() if weight.requires_grad]
    return [values[0].detach(), values[1].detach(), states_NH.grad, *(weight.grad.clone() for weight in weights)]


def assert_same(got, expected, tolerance):
    for value, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=0, atol=tolerance * max(1.0, truth.abs().max().item()))


FORETOLD = {
    "nothing": None,
    "rightly": lambda entropy: lambda *_: (slopes_of()[0], slopes_of()[1] if entropy else None),
    "wrongly": lambda entropy: lambda logprobs_N, entropy_N: (logprobs_N, None if entropy else entropy_N),
    "nearly": lambda entropy: lambda *_: (1.001 * slopes_of()[0], 0.999 * slopes_of()[1] if entropy else None),
    "in part": lambda entropy: lambda *_: (slopes_of()[0] * (torch.arange(N) % 3 > 0), slopes_of()[1]),
    "but for one": lambda entropy: lambda *_: [by_N / (torch.arange(N) != 3) for by_N in slopes_of()],
    "no numbers": lambda entropy: lambda *_: (slopes_of()[0] / 0.0, torch.full((N,), torch.nan)),
}
HEADS = {
    "qwen3": {"tied": True},
    "phi": {"tied": False},  # with a bias
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.3},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 4, "final_logit_softcapping": 0.5},
}


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    ("kind", "foretold"),
    [(kind, how) for kind in HEADS for how in FORETOLD if kind == "phi" or how in ("nothing", "rightly")],
)
def test_values_and_gradients_are_those_of_the_full_logits(kind, entropy, foretold):
    model = tiny_model(kind, **HEADS[kind])
    head = partial(logits, model)
    assert (plain_head(head) is None) == (kind == "gemma2")
    states_NH, labels_N = tokens()
    expected = graded(model, lambda states: full(head, states, labels_N), states_NH, entropy=entropy)
    slopes = FORETOLD[foretold] and FORETOLD[foretold](entropy)
    for chunk in (None, 5):

        def run(states_NH, chunk=chunk):
            return token_logprobs(head, states_NH, labels_N, entropy=True, slopes=slopes, chunk=chunk)

        assert_same(graded(model, run, states_NH, entropy=entropy), expected, 2e-6)


@pytest.mark.parametrize("foretold", ["nothing", "wrongly"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradients_are_the_slopes_of_the_values(bias, foretold):
    states_NH, labels_N = tokens(torch.float64, 5, 7)
    inputs = [states_NH[:, :3].clone(), draw(7, 3, seed=4, dtype=torch.float64)]
    inputs += [draw(7, seed=5, dtype=torch.float64)] if bias else []
    slopes = None if foretold == "nothing" else lambda logprobs_N, entropy_N: (logprobs_N, entropy_N)

    def values(states_NH, weight_VH, bias_V=None):
        return linear_logprobs(states_NH, weight_VH, bias_V, labels_N, factor=0.7, entropy=True, slopes=slopes, chunk=2)

    inputs = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(values, inputs, nondet_tol=1e-12)  # the second time nothing is made ahead


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("foretold", FORETOLD)
def test_of_frozen_weights_the_states_have_the_same_gradients(foretold, entropy):
    model = tiny_model(tied=False)
    model.lm_head.requires_grad_(False)
    head = partial(logits, model)
    states_NH, labels_N = tokens()
    slopes = FORETOLD[foretold] and FORETOLD[foretold](entropy)

    def run(states_NH):
        return token_logprobs(head, states_NH, labels_N, entropy=True, slopes=slopes, chunk=4)

    got = graded(model, run, states_NH, entropy=entropy)
    expected = graded(model, lambda states: full(head, states, labels_N), states_NH, entropy=entropy)
    assert len(got) == 3
    assert_same(got, expected, 2e-6)


class Products(TorchDispatchMode):
    """Counts the multiplications in products with a side of the vocabulary's size, in units of tokens x H x V."""

    def __init__(self, count=N):
        super().__init__()
        self.unit, self.units = count * H * V, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = [value for value in args if isinstance(value, torch.Tensor)][-2:]
            sides = (*left.shape, right.shape[1])
            self.units += sides[0] * sides[1] * sides[2] / self.unit if V in sides else 0
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("foretold", "frozen", "units"),
    [
        ("nothing", False, 1 + 3 * 15 / 23),  # of 23 tokens 8 have no slope
        ("nothing", True, 1 + 1),
        ("rightly", False, 1 + 2 * 15 / 23),
        ("rightly", True, 1 + 15 / 23),
    ],
)
def test_no_product_is_made_in_vain(foretold, frozen, units):
    model = tiny_model(tied=False)
    model.lm_head.requires_grad_(not frozen)
    states_NH, labels_N = tokens()
    slopes = FORETOLD[foretold] and FORETOLD[foretold](False)
    with Products() as products:
        graded(
            model,
            lambda states: token_logprobs(
                partial(logits, model), states, labels_N, entropy=True, slopes=slopes, chunk=5
            ),
            states_NH,
            entropy=False,
        )
    assert products.units == pytest.approx(units)


def test_slopes_are_asked_for_with_what_is_known():
    model = tiny_model()
    states_NH, labels_N = tokens()
    asked = []

    def slopes(logprobs_N, entropy_N):
        asked.append((logprobs_N.clone(), entropy_N.clone()))
        return logprobs_N, None

    states_NH.requires_grad_()
    logprobs_N, entropy_N, _ = token_logprobs(
        partial(logits, model), states_NH, labels_N, entropy=True, slopes=slopes, chunk=10
    )
    assert len(asked) == 3
    for known, pair in zip((10, 20, 23), asked, strict=True):
        for values_N, truth_N in zip(pair, (logprobs_N, entropy_N), strict=True):
            assert torch.equal(values_N, torch.where(torch.arange(N) < known, truth_N, 0.0))


TWICE = {"epochs": 2, "lr": 1e-7}  # so low that no ratio is clipped
VALUE = {"value": {"lam": 0.9}, "advantage": {"baseline": "none"}}


@pytest.mark.parametrize(
    ("sections", "units"),
    [
        ({}, 3),
        ({"loss": {"entropy_coef": 0.1}}, 3),
        ({"loss": {"kl": "k3", "kl_coef": 0.1}, "optimizer": TWICE}, 3 + 3),
        ({"loss": {"kl": "reward", "kl_coef": 0.1}, "optimizer": TWICE}, 3 + 3),
        ({"loss": {"rollout_cap": 2.0}, "optimizer": TWICE}, 3 + 3),
        ({"loss": {"ratio": "sequence-mean"}, "optimizer": TWICE}, 3 + 4),  # the second ratio is of whole rows
        (VALUE, 3),
        ({**VALUE, "loss": {"kl": "reward", "kl_coef": 0.1}}, 4),  # a return is of all that comes
    ],
)
def test_an_update_foretells_its_loss_where_it_can(monkeypatch, sections, units):
    monkeypatch.setitem(linear_logprobs.__globals__["CHUNK_BYTES"], "cpu", 4 * V * 7)  # 7 tokens in a chunk
    members = some(advantage=0.5)
    optimizer = optimizer_of(policy_of(tiny_model()), run_config(**sections), policy_of(tiny_model(seed=1)))
    with Products(sum(len(member.token_ids) for member in members)) as products:
        optimizer.update(members, 1)
    assert products.units == pytest.approx(1 + units)  # 1: the reference


def test_tied_weights_gather_both_gradients():
    model = tiny_model(tied=True).double()
    ids_N = torch.arange(10, 10 + N)
    labels_N = tokens()[1]

    def gradient(values_of):
        model.zero_grad()
        states_NH = model.get_input_embeddings()(ids_N)
        total(values_of(partial(logits, model), states_NH, labels_N), True).backward()
        return model.get_input_embeddings().weight.grad.clone()

    got = gradient(partial(token_logprobs, entropy=True, slopes=lambda *_: slopes_of(torch.float64), chunk=6))
    torch.testing.assert_close(got, gradient(full), rtol=0, atol=1e-12)


@pytest.mark.parametrize("foretold", ["nothing", "rightly"])
def test_chunks_change_nothing_but_rounding_and_nothing_at_all_the_second_time(foretold):
    model = tiny_model("phi", tied=False)
    states_NH, labels_N = tokens()
    slopes = FORETOLD[foretold] and FORETOLD[foretold](True)

    def by(chunk):
        run = partial(
            token_logprobs, partial(logits, model), labels_N=labels_N, entropy=True, slopes=slopes, chunk=chunk
        )
        return graded(model, lambda states_NH: run(states_NH=states_NH), states_NH, entropy=True)

    whole = by(None)
    for chunk in (1, 7, 100):
        once, again = by(chunk), by(chunk)
        assert_same(once, whole, 1e-6)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_gradients_made_ahead_are_the_same_to_the_bit():
    model = tiny_model(tied=False)
    states_NH, labels_N = tokens()
    by_N = draw(N, seed=2)

    def by(slopes):
        values = token_logprobs(partial(logits, model), states_NH, labels_N, entropy=True, slopes=slopes, chunk=9)
        return torch.autograd.grad((values[0] * by_N).sum(), [states_NH, model.lm_head.weight])

    states_NH.requires_grad_()
    assert all(torch.equal(a, b) for a, b in zip(by(None), by(lambda *_: (by_N, None)), strict=True))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("foretold", ["nothing", "rightly", "wrongly"])
def test_a_graph_can_be_gone_through_twice_and_holds_several_calls(foretold, frozen):
    model = tiny_model(tied=False).double()
    model.lm_head.requires_grad_(not frozen)
    head = partial(logits, model)
    states_NH, labels_N = tokens(torch.float64)
    slopes = FORETOLD[foretold] and FORETOLD[foretold](True)

    def twice(states_NH):
        some = [token_logprobs(head, states_NH, labels_N, entropy=True, slopes=slopes, chunk=9) for _ in range(2)]
        sum(total(values, not frozen) for values in some).backward(retain_graph=True)
        return some[0]

    got = graded(model, twice, states_NH, entropy=not frozen)
    expected = graded(model, lambda states: full(head, states, labels_N), states_NH, entropy=not frozen)
    assert_same(got, [*expected[:2], *(3 * value for value in expected[2:])], 1e-6 if foretold == "rightly" else 1e-12)


@pytest.mark.parametrize("slopes", [None, lambda *known: known])
def test_no_tokens_give_nothing_and_gradients_of_zero(slopes):
    model = tiny_model("phi", tied=False)
    states_NH = torch.zeros(0, H, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    logprobs_N, entropy_N, kl_N = token_logprobs(partial(logits, model), states_NH, none, entropy=True, slopes=slopes)
    assert logprobs_N.shape == entropy_N.shape == kl_N.shape == (0,)
    (logprobs_N.sum() + entropy_N.sum()).backward()
    assert states_NH.grad.shape == (0, H)
    assert torch.equal(model.lm_head.weight.grad, torch.zeros(V, H))
    assert torch.equal(model.lm_head.bias.grad, torch.zeros(V))


def test_without_gradients_none_are_made():
    model = tiny_model()
    states_NH, labels_N = tokens()
    with torch.no_grad(), Products() as products:
        values = token_logprobs(
            partial(logits, model), states_NH, labels_N, entropy=True, slopes=lambda *known: pytest.fail("asked")
        )
    assert products.units == 1
    assert not values[0].requires_grad
    assert_same(values[:2], full(partial(logits, model), states_NH, labels_N), 1e-6)


def test_tokens_of_no_probability_have_no_part_in_entropy_and_gradient():
    model = tiny_model("phi", tied=False)
    with torch.no_grad():
        model.lm_head.bias[60:] = -torch.inf
    states_NH, labels_N = tokens()
    labels_N %= 60
    expected = graded(model, lambda states: small(model, states, labels_N), states_NH, entropy=True)
    for foretold in FORETOLD:
        slopes = FORETOLD[foretold] and FORETOLD[foretold](True)
        run = partial(token_logprobs, partial(logits, model), labels_N=labels_N, entropy=True, slopes=slopes, chunk=9)
        assert_same(graded(model, lambda s, run=run: run(states_NH=s), states_NH, entropy=True), expected, 2e-6)
    labels_N[3] = 70
    logprobs_N, entropy_N, _ = token_logprobs(partial(logits, model), states_NH, labels_N, entropy=True)
    assert logprobs_N[3] == -torch.inf
    assert logprobs_N[:3].isfinite().all()
    assert entropy_N.isfinite().all()


def small(model, states_NH, labels_N):
    """`full` by the first 60 rows of the head."""
    head = model.lm_head
    return full(lambda states: states @ head.weight[:60].T + head.bias[:60], states_NH, labels_N)


def test_improbable_tokens_keep_their_digits():
    model = tiny_model(tied=False)
    states_NH, labels_N = tokens()
    states_NH = 60 * states_NH  # logits of hundreds: exp of most is 0 in float32
    logprobs_N, entropy_N, _ = token_logprobs(partial(logits, model), states_NH, labels_N, entropy=True)
    truth = full(partial(logits, model.double()), states_NH.double(), labels_N)
    assert truth[0].min() < -150
    torch.testing.assert_close(logprobs_N.double(), truth[0], rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(entropy_N.double(), truth[1], rtol=1e-4, atol=1e-4)


def test_what_is_no_number_stays_none():
    model = tiny_model()
    states_NH, labels_N = tokens()
    states_NH[4] = torch.nan
    logprobs_N, entropy_N, _ = token_logprobs(partial(logits, model), states_NH, labels_N, entropy=True)
    assert logprobs_N.isnan().tolist() == entropy_N.isnan().tolist() == [row == 4 for row in range(N)]


@pytest.mark.parametrize("foretold", ["nothing", "rightly"])
def test_sums_over_large_vocabularies_are_exact_to_seven_digits(foretold):
    size = 40_000
    labels_N = torch.randint(0, size, (8,), generator=torch.Generator().manual_seed(1))
    weight_VH, states_NH = draw(size, 16, seed=4), draw(8, 16)
    got = linear_logprobs(states_NH, weight_VH, None, labels_N, entropy=True)
    truth = full(lambda states: states @ weight_VH.double().T, states_NH.double(), labels_N)
    for value, exact in zip(got, truth, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=5e-6)


@pytest.mark.parametrize("foretold", ["nothing", "rightly", "in part"])
def test_products_are_in_the_dtype_of_autocast_and_sums_are_not(foretold):
    model = tiny_model("phi", tied=False)
    head = partial(logits, model)
    states_NH, labels_N = tokens()
    slopes = FORETOLD[foretold] and FORETOLD[foretold](True)

    def cast(values_of):
        def run(states_NH):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return values_of(states_NH)

        return run

    run = partial(token_logprobs, head, labels_N=labels_N, entropy=True, slopes=slopes, chunk=9)
    got = graded(model, cast(lambda states_NH: run(states_NH=states_NH)), states_NH, entropy=True)
    plain = graded(model, cast(lambda states_NH: full(head, states_NH, labels_N)), states_NH, entropy=True)
    exact = graded(model, lambda states_NH: full(head, states_NH, labels_N), states_NH, entropy=True)
    assert [value.dtype for value in got] == [torch.float32] * 5
    assert_same(got[:2], plain[:2], 2e-6)  # of the same logits
    for ours, theirs, truth in zip(got[2:], plain[2:], exact[2:], strict=True):
        assert (ours - truth).norm() < 1.2 * (theirs - truth).norm()  # in bfloat16 both, and no worse
        assert (ours - truth).norm() > 1e-4 * truth.norm()


def test_autocast_leaves_double_precision_alone():
    model = tiny_model(tied=False).double()
    states_NH, labels_N = tokens(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = token_logprobs(partial(logits, model), states_NH, labels_N, entropy=True)
    assert_same(values[:2], full(partial(logits, model), states_NH, labels_N), 1e-12)


def test_backward_under_autocast_is_that_of_the_forward_pass():
    """Its arithmetic is that of the forward pass, wherever it is called."""
    model = tiny_model(tied=False)
    states_NH, labels_N = tokens()

    def run(states_NH):
        return token_logprobs(partial(logits, model), states_NH, labels_N, entropy=True)

    outside = graded(model, run, states_NH, entropy=True)
    states_NH.requires_grad_()
    model.zero_grad()
    loss = total(run(states_NH), True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    assert torch.equal(states_NH.grad, outside[2])
    assert torch.equal(model.lm_head.weight.grad, outside[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_a_small_model_numbers_are_in_float32(dtype):
    model = tiny_model(tied=False).to(dtype)
    head = partial(logits, model)
    states_NH, labels_N = tokens(dtype)
    got = graded(model, lambda s: token_logprobs(head, s, labels_N, entropy=True, chunk=9), states_NH, entropy=True)
    plain = graded(model, lambda s: full(head, s, labels_N), states_NH, entropy=True)
    assert [value.dtype for value in got] == [torch.float32] * 2 + [dtype] * 2
    assert_same(got[:2], plain[:2], 2e-6)
    assert_same(got[2:], plain[2:], 0.02)


class Wide(TorchDispatchMode):
    """Notes the most numbers in a tensor that has a side of the vocabulary's size and another of no width of weights."""

    def __init__(self, size):
        super().__init__()
        self.size, self.most = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and self.size in value.shape and H not in value.shape:
                self.most = max(self.most, value.numel())
        return out


@pytest.mark.parametrize("foretold", FORETOLD)
def test_no_tensor_is_larger_than_a_chunk_of_logits_and_none_is_kept(foretold):
    size, chunk = 5000, 4
    model = tiny_model("phi", vocab_size=size, tied=False)
    states_NH, labels_N = tokens(size=size)
    slopes = FORETOLD[foretold] and FORETOLD[foretold](True)
    kept = []
    states_NH.requires_grad_()
    with Wide(size) as wide, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        values = token_logprobs(partial(logits, model), states_NH, labels_N, entropy=True, slopes=slopes, chunk=chunk)
        total(values, True).backward()
    assert wide.most == chunk * size
    assert max(value.numel() for value in kept if H not in value.shape) == size  # the bias


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_a_chunk_is_as_many_tokens_as_the_bytes_hold(monkeypatch, kind):
    monkeypatch.setitem(linear_logprobs.__globals__["CHUNK_BYTES"], "cpu", 4 * V * 6 + 3)
    model = tiny_model(kind, **HEADS[kind])
    states_NH, labels_N = tokens()
    with Wide(V) as wide:
        token_logprobs(partial(logits, model), states_NH, labels_N)
    assert wide.most == 6 * V


def test_other_heads_take_the_way_of_any_head(tmp_path):
    """Each of them would be another function as a plain layer."""
    policy = load_policy(str(tiny_folder(tmp_path, tied=False)), lora=Lora(r=2, targets=["lm_head", "q_proj"]), seed=3)
    adapted = policy.model
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    hooked = tiny_model()
    hooked.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    patched = tiny_model()
    patched.lm_head.forward = lambda states: torch.nn.functional.linear(states, 2 * patched.lm_head.weight)
    made = tiny_model(tied=False)
    torch.nn.utils.parametrizations.weight_norm(made.lm_head)
    states_NH, labels_N = tokens()
    for model in (adapted, hooked, patched, made):
        head = partial(logits, model)
        assert plain_head(head) is None
        got = graded(
            model, lambda s, head=head: token_logprobs(head, s, labels_N, entropy=True), states_NH, entropy=True
        )
        expected = graded(model, lambda s, head=head: full(head, s, labels_N), states_NH, entropy=True)
        assert len(got) > 3 or model is patched
        assert_same(got, expected, 2e-6)
    assert plain_head(lambda states_NH: states_NH) is None
    base = adapted.get_output_embeddings().base_layer
    assert plain_head(partial(logits, adapted, head=base)) == (base.weight, None, 1.0)


def test_the_head_that_is_handed_in_is_the_one_that_counts():
    model, other = tiny_model(tied=False), tiny_model(tied=False, seed=1)
    states_NH, labels_N = tokens()
    got = token_logprobs(partial(logits, model, head=other.lm_head), states_NH, labels_N)[0]
    assert_same([got], full(partial(logits, other), states_NH, labels_N)[:1], 1e-6)


@pytest.mark.parametrize("first", [False, True])
def test_the_exact_kl_to_another_model(first):
    model, other = tiny_model(tied=False), tiny_model(tied=False, seed=1)
    states_NH, labels_N = tokens()
    pair = [partial(logits, one)(states_NH).log_softmax(-1) for one in (model, other)]
    p_NV, q_NV = reversed(pair) if first else pair
    values = token_logprobs(
        partial(logits, model),
        states_NH,
        labels_N,
        other=Other(states_NH=states_NH, logits=partial(logits, other), first=first),
        chunk=9,
    )
    torch.testing.assert_close(values[2], (p_NV.exp() * (p_NV - q_NV)).sum(-1), rtol=1e-5, atol=1e-6)
    assert values[1].shape == (0,)


def test_a_weight_whose_storage_was_gone_between_the_passes_has_the_same_gradient():
    """As FSDP does with what it gathered: the parameter stays, its storage is let go and filled again."""
    model = tiny_model(tied=False)
    states_NH, labels_N = tokens()

    def run(states_NH):
        return token_logprobs(partial(logits, model), states_NH, labels_N, entropy=True, chunk=9)

    expected = graded(model, run, states_NH, entropy=True)
    weight, held = model.lm_head.weight, model.lm_head.weight.detach().clone()
    states_NH.requires_grad_()
    model.zero_grad()
    loss = total(run(states_NH), True)
    size = weight.untyped_storage().size()
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
        weight.untyped_storage().resize_(0)
        weight.untyped_storage().resize_(size)
        weight.copy_(held)
    loss.backward()
    assert torch.equal(states_NH.grad, expected[2])
    assert torch.equal(weight.grad, expected[3])


def test_the_ways_are_told_apart_in_one_place(monkeypatch):
    model = tiny_model()
    states_NH, labels_N = tokens()
    wanted = token_logprobs(partial(logits, model), states_NH, labels_N, entropy=True)
    monkeypatch.setattr(way, "plain_head", lambda head: None)
    found = token_logprobs(partial(logits, model), states_NH, labels_N, entropy=True)
    assert_same(found[:2], wanted[:2], 1e-6)
    assert "Tokens" in wanted[0].grad_fn.name()
    assert "Tokens" not in found[0].grad_fn.name()
