"""Golden vectors of the losses of preference learning: formulas in plain Python; each check takes the module.

They are plain functions of a module, so that the mutation run can give them a broken one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from loss_golden import INF, NAN, close, t
from torch import Tensor

WIN, LOSE = (-10.0, -4.0, -30.5, -7.25), (-12.0, -3.5, -28.0, -7.25)  # the last pair is a tie
REF_WIN, REF_LOSE = (-11.0, -4.25, -29.0, -6.0), (-11.0, -3.0, -30.0, -6.0)
WIN_TOKENS, LOSE_TOKENS = (4, 2, 10, 5), (3, 7, 8, 5)
LABELS = (0.9, 0.5, 0.0, 1.0)
REFERENCE = ("ref_chosen_P", "ref_rejected_P")
LENGTHS = ("chosen_tokens_P", "rejected_tokens_P")
NEEDS = {"dpo": REFERENCE, "cdpo": REFERENCE, "ipo": REFERENCE + LENGTHS, "simpo": LENGTHS, "orpo": LENGTHS}
MAY = {"dpo": "probability_P", "cdpo": "smoothing", "simpo": "gamma"}
OPTIONAL: dict[str, Any] = {
    "ref_chosen_P": t(*REF_WIN),
    "ref_rejected_P": t(*REF_LOSE),
    "chosen_tokens_P": torch.tensor(WIN_TOKENS),
    "rejected_tokens_P": torch.tensor(LOSE_TOKENS),
    "probability_P": t(*LABELS),
    "smoothing": 0.2,
    "gamma": 0.7,
}


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigma(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def log_odds(logp: float) -> float:
    return logp - math.log(-math.expm1(logp))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def raises(call: Callable[[], Any], message: str) -> None:
    try:
        call()
    except ValueError as error:
        assert str(error) == message, str(error)
    else:
        raise AssertionError(f"not raised: {message}")


def graded(call: Callable[..., Any], *leaves: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """The losses, the metrics where there are any, and the gradients of the losses' sum at the leaves."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    found = call(*leaves)
    loss, metrics = found if isinstance(found, tuple) else (found, {})
    loss.sum().backward()
    assert all(not value.requires_grad and value.dim() == 0 for value in metrics.values())
    return loss.detach(), metrics, [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def pairs_of(m: ModuleType, kind: str, beta: float, **options: Any) -> tuple[Tensor, dict, list[Tensor]]:
    """The pairs above by a kind, with what it needs."""
    given = {name: OPTIONAL[name] for name in NEEDS[kind]} | options
    return graded(lambda win, lose: m.preference_loss(kind, win, lose, beta=beta, **given), t(*WIN), t(*LOSE))


def check_pairs(found: tuple[Tensor, dict, list[Tensor]], wanted: list[tuple[float, float, float]]) -> None:
    """Loss, and its slopes at the chosen and at the rejected log-probability, pair by pair."""
    loss, _, (win, lose) = found
    for got, column in zip((loss, win, lose), zip(*wanted, strict=True), strict=True):
        close(got, t(*column))


def logistic(h: float, p: float = 1.0) -> tuple[float, float]:
    """-p log sigma(h) - (1 - p) log sigma(-h), and its slope sigma(h) - p."""
    return -p * log_sigma(h) - (1 - p) * log_sigma(-h), sigma(h) - p


def golden_sft(m: ModuleType) -> None:
    """Sequences of 2, 3 and 0 tokens that count; NaN and infinities lie under the mask, and nothing comes of them."""
    mask = t([1, 1, 0], [1, 1, 1], [0, 0, 0])
    clean = t([-1, -3, 0], [-0.5, -2, -0.25], [0, 0, 0])
    token, row = {"token-mean": 6.75 / 5}, {"seq-mean-token-sum": 6.75 / 3, "seq-mean-token-mean": (2 + 2.75 / 3) / 3}
    slopes = {
        "token-mean": -mask / 5,
        "seq-mean-token-sum": -mask / 3,
        "seq-mean-token-mean": -mask / t([6.0], [9.0], [1.0]),
    }
    for poison in (0.0, NAN, INF, -INF):
        given = torch.where(mask.bool(), clean, poison)
        for kind in (mask, mask.bool(), mask.long()):
            for aggregate, wanted in {**token, **row}.items():
                loss, _, (grad,) = graded(lambda x, k=kind, a=aggregate: m.sft_loss(x, k, aggregate=a), given)
                assert loss.dim() == 0
                close(loss, wanted)
                close(grad, slopes[aggregate])
        close(m.sft_loss(given, mask), 6.75 / 5)
    nothing, _, (grad,) = graded(lambda x: m.sft_loss(x, mask * 0), clean * NAN)
    close(nothing, 0, 0)
    close(grad, clean * 0, 0)
    shape = "the mask and all that is per token must have one shape BT, not [(1, 3), (3, 3)]"
    raises(lambda: m.sft_loss(clean, mask[:1]), shape)
    known = "aggregate must be token-mean, seq-mean-token-sum, seq-mean-token-mean, not 'seq-mean-token-sum-norm'"
    raises(lambda: m.sft_loss(clean, mask, aggregate="seq-mean-token-sum-norm"), known)


def sft_parts(m: ModuleType, logprobs: Tensor, mask: Tensor, cuts: list[int]) -> None:
    """The parts' losses and gradients add up to those of the whole, where the totals are given."""
    totals = {"num_sequences": len(mask), "num_tokens": int(mask.sum())}
    edges = [0, *sorted(cuts), len(mask)]
    for aggregate in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean"):

        def loss(x: Tensor, a: int = 0, b: int | None = None, how: str = aggregate, **given: Any) -> Tensor:
            return m.sft_loss(x, mask[a:b], aggregate=how, **given)

        whole, _, (slope,) = graded(loss, logprobs)
        parts = [graded(lambda x, a=a, b=b: loss(x, a, b, **totals), logprobs[a:b]) for a, b in pairwise(edges)]
        close(sum(part[0] for part in parts), whole)
        close(torch.cat([part[2][0] for part in parts]), slope)


def golden_sft_parts(m: ModuleType) -> None:
    mask = t([1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0])
    logprobs = t([-1, -3, NAN], [-0.5, -2, -0.25], [NAN, NAN, NAN], [NAN, -4, NAN])
    for cuts in ([1], [2, 3], [0, 2, 2]):
        sft_parts(m, logprobs, mask, cuts)
    close(m.sft_loss(logprobs, mask, num_tokens=torch.tensor(12)), 10.75 / 12)


def golden_bradley_terry(m: ModuleType) -> None:
    """Vector 6 and the formula; a soft label is a mixture of both orders; only the rewards carry a gradient."""
    close(m.bradley_terry_loss(t(1.2), t(0.3)), t(0.341154), 1e-6)
    close(m.bradley_terry_loss(t(1.2), t(0.3), margin_P=t(0.5)), t(0.513015), 1e-6)
    win, lose, margin = (1.2, -3.0, 0.5, 4.0), (0.3, 2.0, 0.5, -9.0), (0.5, 1.0, 0.0, -2.0)
    for m_P in (None, margin):
        for p_P in (None, LABELS):
            constants = {"margin_P": m_P, "probability_P": p_P}
            held = {name: t(*value).requires_grad_() for name, value in constants.items() if value}
            found = graded(lambda a, b, held=held: m.bradley_terry_loss(a, b, **held), t(*win), t(*lose))
            wanted = []
            for i in range(4):
                loss, slope = logistic(win[i] - lose[i] - (m_P[i] if m_P else 0), p_P[i] if p_P else 1.0)
                wanted.append((loss, slope, -slope))
            check_pairs(found, wanted)
            assert all(value.grad is None for value in held.values())
    shape = "all must be rows of one length, not [(1,), (4,)]"
    raises(lambda: m.bradley_terry_loss(t(*win), t(0.3)), shape)
    raises(lambda: m.bradley_terry_loss(t(*win), t(*lose), margin_P=t(0.5)), shape)
    raises(lambda: m.bradley_terry_loss(t(*win), t(*lose), probability_P=t(0.5)), shape)
    square = "all must be rows of one length, not [(1, 1)]"
    raises(lambda: m.bradley_terry_loss(t([1.0]), t([2.0])), square)


def golden_ranking(m: ModuleType) -> None:
    """Vector 6; the formula term by term; its slopes are what each softmax gives less 1 for its best; far scores."""
    close(m.ranking_loss(t(2, 1, 0)), 0.720868, 1e-6)
    for scores in ((2.0, 1.0, 0.0), (-1.0, 0.5, 0.25, 3.0), (0.3, 1.2), (7.0,)):
        wanted, slopes = 0.0, [0.0] * len(scores)
        for k in range(len(scores)):
            total = math.fsum(math.exp(score) for score in scores[k:])
            wanted -= math.log(math.exp(scores[k]) / total)
            for j in range(k, len(scores)):
                slopes[j] += math.exp(scores[j]) / total - (j == k)
        loss, _, (grad,) = graded(m.ranking_loss, t(*scores))
        assert loss.dim() == 0
        close(loss, wanted)
        close(grad, t(*slopes))
    loss, _, (grad,) = graded(m.ranking_loss, t(-1e4, 0, 1e4))
    close(loss, 1e4 + 2e4)
    close(grad, t(-1, -1, 2))
    close(m.ranking_loss(torch.tensor([1e4, 1e4 - 1])), log_sigma(1) * -1, 1e-6)  # float32 of 1e4 has steps of 1e-3
    close(m.ranking_loss(t(*[1.0] * 5)), math.log(120))
    raises(lambda: m.ranking_loss(t([1.0, 2.0])), "all must be rows of one length, not [(1, 2)]")


def golden_outcome(m: ModuleType) -> None:
    logits, right = (2.0, -1.5, 0.0, 1e4, -1e4), (1, 1, 0, 0, 0)
    wanted = [logistic(z, r) for z, r in zip(logits, right, strict=True)]
    for label in (torch.tensor(right), torch.tensor(right).bool(), t(*right).requires_grad_()):
        loss, _, (grad,) = graded(lambda z, r=label: m.outcome_loss(z, r), t(*logits))
        close(loss, t(*[value for value, _ in wanted]))
        close(grad, t(*[slope for _, slope in wanted]))
        assert label.grad is None
    soft, _, (grad,) = graded(lambda z: m.outcome_loss(z, t(0.25)), t(2.0))
    close(soft, t(logistic(2.0, 0.25)[0]))
    close(grad, t(sigma(2.0) - 0.25))
    raises(lambda: m.outcome_loss(t(*logits), t(1.0)), "all must be rows of one length, not [(1,), (5,)]")


def golden_steps(m: ModuleType) -> None:
    """Columns in the order wrong, neutral, right; an unknown label is told, whatever its type."""
    logits = ((1.0, -0.5, 2.0), (0.0, 3.0, 1.0), (-1e4, 0.0, 1e4))
    for labels in ((-1, 0, 1), (1, -1, -1), (0, 1, 0)):
        for label in (torch.tensor(labels), t(*labels), torch.tensor(labels, dtype=torch.int8)):
            loss, _, (grad,) = graded(lambda z, y=label: m.step_loss(z, y), t(*logits))
            for i in range(3):
                top = max(logits[i])
                total = math.fsum(math.exp(z - top) for z in logits[i])
                close(loss[i], math.log(total) + top - logits[i][labels[i] + 1])
                shares = [math.exp(z - top) / total - (j == labels[i] + 1) for j, z in enumerate(logits[i])]
                close(grad[i], t(*shares))
    for wrong in (-2, 2, -100, -101, 0.5, NAN):
        label = torch.tensor([0, 1, wrong])
        raises(lambda y=label, w=wrong: m.step_loss(t(*logits), y), f"a step is labelled -1, 0 or 1, not {wrong}")
    labels = torch.tensor([0, 1, 1])
    for z, y in ((t(*logits)[:, :2], labels), (t(*logits)[:2], labels), (t(*logits), labels[:, None])):
        text = f"the logits must be N x 3 and the labels N, not {tuple(z.shape)} and {tuple(y.shape)}"
        raises(lambda z=z, y=y: m.step_loss(z, y), text)


def golden_dpo(m: ModuleType) -> None:
    """Vector 7, the formula, and the slope -beta sigma(r_l - r_w) of the hard label, sigma(h) - p of the soft one."""
    loss, _, _ = pairs_of(m, "dpo", 0.1)
    close(loss[0], 0.598139, 1e-6)
    for beta in (0.1, 2.0):
        h = [beta * (WIN[i] - REF_WIN[i] - LOSE[i] + REF_LOSE[i]) for i in range(4)]
        hard = [(-log_sigma(x), -beta * sigma(-x), beta * sigma(-x)) for x in h]
        check_pairs(pairs_of(m, "dpo", beta), hard)
        soft = [logistic(x, p) for x, p in zip(h, LABELS, strict=True)]
        found = pairs_of(m, "dpo", beta, probability_P=t(*LABELS))
        check_pairs(found, [(value, beta * slope, -beta * slope) for value, slope in soft])


def golden_cdpo(m: ModuleType) -> None:
    loss, _, _ = pairs_of(m, "cdpo", 0.1, smoothing=0.1)
    close(loss[0], 0.618139, 1e-6)
    for epsilon in (0.0, 0.3):
        h = [0.4 * (WIN[i] - REF_WIN[i] - LOSE[i] + REF_LOSE[i]) for i in range(4)]
        both = [logistic(x, 1 - epsilon) for x in h]
        found = pairs_of(m, "cdpo", 0.4, smoothing=epsilon)
        check_pairs(found, [(value, 0.4 * slope, -0.4 * slope) for value, slope in both])


def golden_ipo(m: ModuleType) -> None:
    """Vector 7, of responses of one token; then ratios averaged over 4 and 3 tokens, and so on."""
    one = torch.ones(4)
    loss, _, _ = pairs_of(m, "ipo", 0.1, chosen_tokens_P=one, rejected_tokens_P=one)
    close(loss[0], 9.0)
    wanted = []
    for i in range(4):
        better, worse = (WIN[i] - REF_WIN[i]) / WIN_TOKENS[i], (LOSE[i] - REF_LOSE[i]) / LOSE_TOKENS[i]
        error = better - worse - 1 / (2 * 0.4)
        wanted.append((error**2, 2 * error / WIN_TOKENS[i], -2 * error / LOSE_TOKENS[i]))
    check_pairs(pairs_of(m, "ipo", 0.4), wanted)


def golden_simpo(m: ModuleType) -> None:
    """gamma is inside of sigma, whatever beta is."""
    for beta, gamma in ((2.0, 0.0), (2.0, 0.7), (0.5, 1.5)):
        wanted = []
        for i in range(4):
            h = beta * WIN[i] / WIN_TOKENS[i] - beta * LOSE[i] / LOSE_TOKENS[i] - gamma
            slope = -beta * sigma(-h)
            wanted.append((-log_sigma(h), slope / WIN_TOKENS[i], -slope / LOSE_TOKENS[i]))
        check_pairs(pairs_of(m, "simpo", beta, gamma=gamma), wanted)


def golden_orpo(m: ModuleType) -> None:
    """The mean NLL of the chosen and beta times the odds; d log odds / d log p = 1 / (1 - p)."""
    for beta in (0.1, 1.5):
        wanted = []
        for i in range(4):
            better, worse = WIN[i] / WIN_TOKENS[i], LOSE[i] / LOSE_TOKENS[i]
            h = log_odds(better) - log_odds(worse)
            push = beta * sigma(-h)
            win = -1 - push / -math.expm1(better)
            wanted.append(
                (-better - beta * log_sigma(h), win / WIN_TOKENS[i], push / -math.expm1(worse) / LOSE_TOKENS[i])
            )
        check_pairs(pairs_of(m, "orpo", beta), wanted)


def golden_certain(m: ModuleType) -> None:
    """log(1 - p) to the last digits near p = 1, also in float32, and finite at p = 1 or a rounding above it."""
    one = torch.ones(1)

    def call(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return m.preference_loss("orpo", chosen, rejected, beta=0.5, chosen_tokens_P=one, rejected_tokens_P=one)

    for dtype, within in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for near in (-1e-3, -1e-7, -1e-11):
            for win, lose in ((near, -2.0), (-2.0, near), (near, near / 2)):
                chosen, rejected = torch.tensor([win], dtype=dtype), torch.tensor([lose], dtype=dtype)
                loss, _, (up, down) = graded(call, chosen, rejected)
                win, lose = float(chosen), float(rejected)
                h = log_odds(win) - log_odds(lose)
                close(loss / (-win - 0.5 * log_sigma(h)), t(1.0), within)
                close(up / (-1 - 0.5 * sigma(-h) / -math.expm1(win)), t(1.0), within)
                close(down / (0.5 * sigma(-h) / -math.expm1(lose)), t(1.0), within)
        for certain in (0.0, 1e-7, 1.0):
            for win, lose in ((certain, -2.0), (-2.0, certain), (certain, certain)):
                chosen, rejected = torch.tensor([win], dtype=dtype), torch.tensor([lose], dtype=dtype)
                loss, _, (up, down) = graded(call, chosen, rejected)
                assert loss.isfinite() and up.isfinite() and down.isfinite()
                h = log_odds(min(win, -1e-12)) - log_odds(min(lose, -1e-12))
                close(loss, t(-float(chosen) - 0.5 * log_sigma(h)), 1e-5)
    close(call(t(0.0), t(0.0))[0], t(math.log(2) / 2))


def golden_pair_metrics(m: ModuleType) -> None:
    """By hand: one pair is right, two wrong, one a tie that counts half; rewards are what the kind compares."""
    for kind in NEEDS:
        extra = {"dpo": {"probability_P": t(*LABELS)}, "cdpo": {"smoothing": 0.2}, "simpo": {"gamma": 0.7}}.get(
            kind, {}
        )
        loss, metrics, _ = pairs_of(m, kind, 0.3, **extra)
        has_ref, per_token = kind in ("dpo", "cdpo", "ipo"), kind in ("ipo", "simpo", "orpo")
        sides = []
        for logp, ref, tokens in ((WIN, REF_WIN, WIN_TOKENS), (LOSE, REF_LOSE, LOSE_TOKENS)):
            gain = [logp[i] - ref[i] * has_ref for i in range(4)]
            sides.append([0.3 * gain[i] / (tokens[i] if per_token else 1) for i in range(4)])
        right = [0.5 if a == b else float(a > b) for a, b in zip(*sides, strict=True)]
        assert 0.5 in right
        wanted = {
            "rewards/chosen": mean(sides[0]),
            "rewards/rejected": mean(sides[1]),
            "rewards/margin": mean(sides[0]) - mean(sides[1]),
            "rewards/accuracy": mean(right),
            "logps/chosen": mean(WIN),
            "logps/rejected": mean(LOSE),
        }
        if has_ref:
            wanted["displacement/chosen"] = mean(WIN) - mean(REF_WIN)
            wanted["displacement/rejected"] = mean(LOSE) - mean(REF_LOSE)
        if kind == "orpo":
            wanted["nll"] = -mean([WIN[i] / WIN_TOKENS[i] for i in range(4)])
        assert metrics.keys() == wanted.keys()
        for name, value in wanted.items():
            close(metrics[name], value)
    for win, lose, wanted in ((1, 0, 1.0), (0, 1, 0.0), (1, 1, 0.5)):
        found = m.preference_loss("dpo", t(win), t(lose), t(0), t(0), beta=0.1)[1]
        close(found["rewards/accuracy"], wanted, 0)
    for kind in NEEDS:
        given = {name: OPTIONAL[name][:0] for name in NEEDS[kind]}
        loss, metrics = m.preference_loss(kind, t(), t(), beta=0.1, **given)
        assert loss.shape == (0,)
        assert all(float(value) == 0 for value in metrics.values())  # of nothing


def golden_pair_refusals(m: ModuleType) -> None:
    """A kind takes what it needs, what it may have, and nothing else."""
    for kind in NEEDS:
        needed = {name: OPTIONAL[name] for name in NEEDS[kind]}

        def call(kind: str = kind, beta: float = 0.1, **given: Any) -> Any:
            return m.preference_loss(kind, t(*WIN), t(*LOSE), beta=beta, **given)

        for name in OPTIONAL:
            if name in needed:
                rest = {other: value for other, value in needed.items() if other != name}
                raises(lambda call=call, rest=rest: call(**rest), f"kind={kind!r} needs {name}")
            elif name != MAY.get(kind):
                more = needed | {name: OPTIONAL[name]}
                raises(lambda call=call, more=more: call(**more), f"kind={kind!r} takes no {name}")
            else:
                changed = call(**needed, **{name: OPTIONAL[name]})[0]
                assert (changed - call(**needed)[0]).abs().max() > 0.01
        raises(lambda call=call: call(), f"kind={kind!r} needs {' and '.join(needed)}")
        for beta in (0.0, -0.1, NAN):
            raises(lambda call=call, n=needed, b=beta: call(beta=b, **n), f"beta must be above 0, not {beta}")
        for name in needed:
            short = needed | {name: needed[name][:1]}
            raises(lambda call=call, s=short: call(**s), "all must be rows of one length, not [(1,), (4,)]")
    unknown = "kind must be dpo, cdpo, ipo, simpo or orpo, not 'kto'"
    raises(lambda: m.preference_loss("kto", t(1), t(1), beta=0.1), unknown)
    both = "kind='simpo' takes no ref_chosen_P and no probability_P"
    more = {name: OPTIONAL[name] for name in (*LENGTHS, "ref_chosen_P", "probability_P")}
    raises(lambda: m.preference_loss("simpo", t(*WIN), t(*LOSE), beta=0.1, **more), both)
    reference = {name: OPTIONAL[name] for name in REFERENCE}
    for share in (-0.1, 0.5, NAN):
        text = f"smoothing must be in [0, 0.5) and gamma not negative: {share}, 0.0"
        raises(lambda s=share: m.preference_loss("cdpo", t(*WIN), t(*LOSE), beta=0.1, smoothing=s, **reference), text)
    lengths = {name: OPTIONAL[name] for name in LENGTHS}
    text = "smoothing must be in [0, 0.5) and gamma not negative: 0.0, -0.5"
    raises(lambda: m.preference_loss("simpo", t(*WIN), t(*LOSE), beta=0.1, gamma=-0.5, **lengths), text)
    raises(
        lambda: m.preference_loss("dpo", t(*WIN), t(1), beta=0.1, **reference),
        "all must be rows of one length, not [(1,), (4,)]",
    )


def golden_pair_constants(m: ModuleType) -> None:
    """The reference and the labels carry no gradient, the lengths are whole numbers, and none is taken for 1."""
    for kind in NEEDS:
        names = [name for name in NEEDS[kind] if name.startswith("ref")] + ["probability_P"] * (kind == "dpo")
        leaves = {name: OPTIONAL[name].clone().requires_grad_() for name in names}
        pairs_of(m, kind, 0.1, **leaves)
        assert all(leaf.grad is None for leaf in leaves.values())
    for kind in ("simpo", "ipo"):
        empty, single = torch.zeros(4), torch.ones(4)
        found = [pairs_of(m, kind, 0.1, chosen_tokens_P=x, rejected_tokens_P=x)[0] for x in (empty, single)]
        close(found[0], found[1], 0)


def golden_extremes(m: ModuleType) -> None:
    """Log-probabilities of +-1e4 either way: finite losses and gradients, in float32 too; half is not computed in half."""
    far = [(a, b) for a in (-1e4, 1e4, 0.0) for b in (-1e4, 1e4, 0.0)]
    win, lose = (torch.tensor(side) for side in zip(*far, strict=True))
    zero, one = torch.zeros(9), torch.ones(9)
    sides = {"ref_chosen_P": zero, "ref_rejected_P": zero, "chosen_tokens_P": one, "rejected_tokens_P": one}
    for kind in NEEDS:
        for extra in ({}, {MAY[kind]: {"probability_P": one * 0.5}.get(MAY[kind], 0.3)} if kind in MAY else {}):
            given = {name: sides[name] for name in NEEDS[kind]} | extra
            loss, metrics, grads = graded(lambda a, b, k=kind, g=given: m.preference_loss(k, a, b, beta=0.5, **g), win, lose)  # fmt: skip
            assert loss.dtype == torch.float32
            for value in (loss, *grads, *metrics.values()):
                assert value.isfinite().all()
    for side in (True, False):
        loss, metrics, (grad,) = graded(lambda x, s=side: m.kto_loss(x, zero, torch.full((9,), s), 0.0, beta=0.5), win)
        assert loss.isfinite().all() and grad.isfinite().all()
    bt, _, grads = graded(m.bradley_terry_loss, win, lose)
    close(bt, t(*[-log_sigma(a - b) for a, b in far]), 1e-6)
    assert all(grad.isfinite().all() for grad in grads)
    for dtype in (torch.bfloat16, torch.float16):
        chosen, rejected = torch.tensor([-1.5], dtype=dtype), torch.tensor([-1.25], dtype=dtype)
        loss, _ = m.preference_loss("dpo", chosen, rejected, chosen * 0, rejected * 0, beta=0.1)
        assert loss.dtype == torch.float32
        close(loss, t(-log_sigma(-0.025)), 1e-7)
        mixed, _ = m.preference_loss("dpo", chosen, rejected.double(), chosen * 0, rejected * 0, beta=0.1)
        close(mixed, t(-log_sigma(-0.025)), 1e-7)
        close(m.bradley_terry_loss(chosen, rejected), t(-log_sigma(-0.25)), 1e-7)
        close(m.step_loss(torch.zeros(1, 3, dtype=dtype), torch.tensor([0])), t(math.log(3)), 1e-7)
        assert m.sft_loss(chosen[None], torch.ones(1, 1)).dtype == torch.float32


def golden_kto(m: ModuleType) -> None:
    """Both sides of eq. 8 with weights; z is cut at 0 and a constant, as a number or as a tensor."""
    logp, ref, good = (-10.0, -4.0, -30.0, -7.0), (-11.0, -4.5, -27.0, -8.0), (True, False, False, True)
    for kl, z in ((0.25, 0.25), (-3.0, 0.0), (0, 0.0), (torch.tensor(0.25), 0.25), (torch.tensor(-1.0), 0.0)):
        for up, down in ((1.0, 1.0), (1.5, 0.75), (0.0, 1.0), (1.0, 0.0)):
            if isinstance(kl, Tensor):
                kl = kl.detach().requires_grad_()
            held = t(*ref).requires_grad_()
            given = {"beta": 0.4, "desirable_weight": up, "undesirable_weight": down}
            call = lambda x, kl=kl, held=held, given=given: m.kto_loss(x, held, torch.tensor(good), kl, **given)  # noqa: E731
            loss, metrics, (grad,) = graded(call, t(*logp))
            for i in range(4):
                sign, weight = (1, up) if good[i] else (-1, down)
                value = sigma(sign * 0.4 * (logp[i] - ref[i] - z))
                close(loss[i], weight * (1 - value))
                close(grad[i], -weight * sign * 0.4 * value * (1 - value))
            assert held.grad is None and (not isinstance(kl, Tensor) or kl.grad is None)
            wanted = {
                "kl": z,
                "desirable": 0.5,
                "rewards/chosen": 0.4,
                "rewards/rejected": 0.4 * -1.25,
                "rewards/margin": 0.4 * 2.25,
                "logps/chosen": -8.5,
                "logps/rejected": -17.0,
                "displacement/chosen": 1.0,
                "displacement/rejected": -1.25,
            }
            assert metrics.keys() == wanted.keys()
            for name, expected in wanted.items():
                close(metrics[name], expected)
    tail = m.kto_loss(torch.tensor([40.0]), torch.zeros(1), torch.tensor([True]), 0.0, beta=1.0)[0]
    close(tail / math.exp(-40), t(1.0), 1e-6)  # not 1 - 1
    close(m.kto_loss(t(2), t(0), torch.tensor([True]), 0.5, beta=2.0)[0], t(1 - sigma(3.0)))


def golden_kto_sides(m: ModuleType) -> None:
    """Of a side with nobody there is no metric; a NaN of one side touches nothing of the other."""
    for good, side in ((True, "chosen"), (False, "rejected")):
        metrics = m.kto_loss(t(-1, -3), t(-2, -2.5), torch.tensor([good, good]), 0.0, beta=0.5)[1]
        wanted = {
            f"rewards/{side}": 0.125,
            f"logps/{side}": -2,
            f"displacement/{side}": 0.25,
            "kl": 0,
            "desirable": good,
        }
        assert metrics.keys() == wanted.keys()
        for name, value in wanted.items():
            close(metrics[name], value)
        loss, metrics, (grad,) = graded(
            lambda x, g=good: m.kto_loss(x, t(-2, 0, -2), torch.tensor([g, not g, g]), 0.0, beta=0.5), t(-1, NAN, -1)
        )
        sign = 1 if good else -1
        value = sigma(sign * 0.5)
        close(loss[[0, 2]], t(1 - value, 1 - value))
        close(grad[[0, 2]], t(-sign * 0.5 * value * (1 - value), -sign * 0.5 * value * (1 - value)))
        close(metrics[f"logps/{side}"], -1)
        close(metrics[f"rewards/{side}"], 0.5)
    loss, metrics = m.kto_loss(t(), t(), torch.zeros(0, dtype=torch.bool), 0.0, beta=0.5)
    assert loss.shape == (0,) and metrics.keys() == {"kl", "desirable"} and float(metrics["desirable"]) == 0


def golden_kto_refusals(m: ModuleType) -> None:
    good = torch.tensor([True, False])

    def call(logp: Sequence[float] = (-1, -2), label: Tensor = good, **options: Any) -> Any:
        options = {"kl": 0.0, "beta": 0.1, **options}
        return m.kto_loss(t(*logp), t(-1, -1), label, options.pop("kl"), **options)

    call()
    call(desirable_weight=0.0, undesirable_weight=0.0)
    for given, numbers in (
        ({"beta": 0.0}, "0.0; 1.0, 1.0"),
        ({"beta": NAN}, "nan; 1.0, 1.0"),
        ({"desirable_weight": -0.5}, "0.1; -0.5, 1.0"),
        ({"undesirable_weight": -0.5}, "0.1; 1.0, -0.5"),
    ):
        raises(lambda g=given: call(**g), f"beta must be above 0 and no weight negative: {numbers}")
    raises(lambda: call(label=torch.tensor([1, -1])), "desirable_B must be boolean, not torch.int64")
    raises(lambda: call(label=good[:1]), "all must be rows of one length, not [(1,), (2,)]")
    raises(lambda: call(logp=(-1,)), "all must be rows of one length, not [(1,), (2,)]")
    raises(lambda: call(kl=t(0.1)), "kl is one number for the batch, not of (1,)")


def golden_kto_kl(m: ModuleType) -> None:
    """The mean first, then the cut; no gradient; of nothing 0."""
    logp = t(-1, -5, -2).requires_grad_()
    estimate = m.kto_kl(logp, t(-2, -4, -4))
    assert not estimate.requires_grad and estimate.dim() == 0
    close(estimate, 2 / 3)
    close(m.kto_kl(t(-4, -4), t(-2, -5)), 0, 0)
    close(m.kto_kl(t(), t()), 0, 0)
    assert m.kto_kl(t(-4).bfloat16(), t(-5).bfloat16()).dtype == torch.float32
    raises(lambda: m.kto_kl(t(-4, -4), t(-5)), "all must be rows of one length, not [(1,), (2,)]")


ALL = [check for name, check in list(globals().items()) if name.startswith("golden_")]
