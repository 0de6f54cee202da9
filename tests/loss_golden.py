"""Golden vectors of the loss, the KL and the value head, worked by hand; each check takes the module under test.

They are plain functions of a module, so that the mutation run can give them a broken one.
"""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAN, INF = math.nan, math.inf
RATIOS = ("token", "sequence", "sequence-mean", "tapered", "none")
AGGREGATES = ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean", "token-mean")


def t(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got: Any, wanted: Any, atol: float = 1e-9) -> None:
    got, wanted = (torch.as_tensor(value, dtype=torch.float64) for value in (got, wanted))
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol, equal_nan=True)


def loss_of(m: ModuleType, new: Tensor, old: Tensor | None, gain: Tensor, mask: Tensor, **options: Any) -> tuple:
    """The loss, the metrics and the gradient at the log-probabilities."""
    new = new.detach().clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss, metrics = m.policy_loss(new, old, gain, mask.bool(), **options)
    loss.backward()
    assert new.grad is not None and not any(value.requires_grad for value in metrics.values())
    return loss.detach(), metrics, new.grad


def one(m: ModuleType, rho: float, gain: float, **options: Any) -> tuple[float, float, dict]:
    """Objective and its gradient by log pi for a single token of that ratio."""
    old = t([-1.0])
    loss, metrics, grad = loss_of(m, old + math.log(rho), old, t(gain), torch.ones(1, 1), **options)
    return -float(loss), -float(grad), metrics


def batch(seed: int = 0, rows: int = 6, length: int = 5) -> dict[str, Tensor]:
    """Log-probabilities, mask with a hole, a row wholly under the mask, advantages of both signs."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    mask = torch.rand(rows, length, generator=random) < 0.7
    mask[0], mask[1] = True, False
    old = -normal(rows, length).abs() - 0.1
    return {
        "logprobs_BT": old + 0.3 * normal(rows, length),
        "old_logprobs_BT": old,
        "advantage": normal(rows),
        "mask_BT": mask,
        "ref_logprobs_BT": old + 0.2 * normal(rows, length),
        "full_kl_BT": normal(rows, length).abs(),
        "entropy_BT": normal(rows, length).abs(),
        "rollout_logprobs_BT": old + 0.5 * normal(rows, length),
    }


def graded(m: ModuleType, given: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict, list[Tensor]]:
    """Loss, metrics and the gradients of all three that carry one."""
    leaves = {
        name: given[name].clone().requires_grad_()
        for name in ("logprobs_BT", "full_kl_BT", "entropy_BT")
        if name in given
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss, metrics = m.policy_loss(**{**given, **leaves}, **options)
    loss.backward()
    return loss.detach(), metrics, [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.values()]


ALL_ON = {"kl": "full", "kl_coef": 0.3, "entropy_coef": 0.1, "norm_length": 7, "rollout_cap": 1.5, "clip_low": 0.1}


def golden_clip(m: ModuleType) -> None:
    """Vector 3 and its neighbours: exactly no gradient where clipped, for a token and for a sequence of one."""
    equal = [(1.5, 1, 1.2, "high"), (0.5, 1, 0.5, ""), (1.1, 1, 1.1, ""), (1.5, -1, -1.5, ""), (0.5, -1, -0.8, "low"), (0.9, -1, -0.9, "")]  # fmt: skip
    apart = [(1.25, 2, 2.5, ""), (1.35, 2, 2.6, "high"), (0.85, -2, -1.8, "low"), (0.95, -2, -1.9, ""), (1.35, -2, -2.7, ""), (0.85, 2, 1.7, "")]  # fmt: skip
    dual = [(4, -0.5, -1.5, "dual"), (2.9, -1, -2.9, ""), (4, 1, 1.2, "high"), (0.5, -1, -0.8, "low"), (2, 0, 0, ""), (0.5, 0, 0, ""), (4, 0, 0, ""), (4, 0.5, 0.6, "high"), (0.5, 0.5, 0.25, "")]  # fmt: skip
    table = [(equal, {}), (apart, {"clip_low": 0.1, "clip_high": 0.3}), (dual, {"dual_clip": 3.0})]
    for cases, options in table:
        for rho, gain, wanted, where in cases:
            for ratio in ("token", "sequence", "sequence-mean"):
                objective, grad, metrics = one(m, rho, gain, ratio=ratio, **options)
                close(objective, wanted)
                close(grad, 0.0 if where else rho * gain, 0 if where else 1e-9)
                for name in ("low", "high", "dual"):
                    close(metrics[f"clip_{name}"], float(name == where), 0)
                close(metrics["ratio_mean"], rho)
                close(metrics["ratio_max"], rho)
                close(metrics["policy_loss"], -wanted)
                close(metrics["approx_kl"], math.log(rho) ** 2 / 2)


def golden_shares(m: ModuleType) -> None:
    """One of five tokens clipped high, two low, one by the second bound; a ratio equal to a bound is not clipped."""
    rho = t([1.5, 0.5, 0.5, 4, 1, 9])
    gain, mask = t([1, -1, -1, -1, 1, 1]), t([1, 1, 1, 1, 1, 0])
    _, metrics, _ = loss_of(m, rho.log(), rho * 0, gain, mask, dual_clip=3.0)
    for name, wanted in (("low", 0.4), ("high", 0.2), ("dual", 0.2)):
        close(metrics[f"clip_{name}"], wanted, 1e-6)
    log = t([1.5])
    for ratio in ("token", "sequence"):
        exact = float(log.exp())
        _, metrics, grad = loss_of(m, log, log * 0, t(-1), log * 0 + 1, ratio=ratio, dual_clip=exact)
        close(grad, t([exact]))
        close(metrics["clip_dual"], 0, 0)


def golden_equation_14(m: ModuleType) -> None:
    """Vector 2: the advantages of two questions, lengths 2, 3, 1, 4, ratio 1."""
    mask = torch.arange(4)[None, :] < torch.tensor([2, 3, 1, 4])[:, None]
    gain = t(0.328605, -0.328605, 0.081977, -0.081977)
    old = -torch.rand(4, 4, dtype=torch.float64)
    for given in (old, None):
        loss, _, grad = loss_of(m, old, given, gain, mask)
        close(loss, 0.143634, 1e-6)
        close(grad, torch.where(mask, -gain[:, None] / 4, 0.0))
        per_token, _, same = loss_of(m, old, given, gain[:, None].expand(4, 4), mask)
        close(per_token, loss, 0)
        close(same, grad, 0)


def golden_sequences(m: ModuleType) -> None:
    """Vector 4, with a token of another ratio under the mask, and the mean over rows."""
    old = t([-1, -2, -0.5, -3], [-1, -1, -1, -1])
    new = old + t([0.1, 0.1, 0.1, 5], [-0.1, 0.3, 0.05, -5])
    mask = t([1, 1, 1, 0], [1, 1, 1, 0])
    for aggregate in AGGREGATES:
        options = {"aggregate": aggregate, "norm_length": 9}
        loss, metrics, grad = loss_of(m, new, old, t(1, -1), mask, ratio="sequence", **options)
        close(loss, (-1.2 + 1.284025) / 2, 1e-6)
        close(grad, torch.stack([torch.zeros(4), t(1, 1, 1, 0) * 1.284025 / 2]), 1e-6)
        close(metrics["ratio_mean"], (1.349859 + 1.284025) / 2, 1e-6)
        close(metrics["ratio_max"], 1.349859, 1e-6)
        close(metrics["clip_high"], 0.5, 0)
        close(metrics["clip_low"], 0, 0)
        loss, metrics, grad = loss_of(m, new, old, t(1, -2), mask, ratio="sequence-mean", clip_high=0.1, **options)
        close(loss, (-1.1 + 2 * math.exp(0.25 / 3)) / 2)
        close(grad, torch.stack([torch.zeros(4), t(1, 1, 1, 0) * math.exp(0.25 / 3) / 3]))
        close(metrics["ratio_max"], math.exp(0.1))


def golden_tapered_and_none(m: ModuleType) -> None:
    """TOPR: a negative sample counts by min(rho, 1), a positive one by 1, neither as a gradient. REINFORCE: as it is."""
    new = t([-1, -2], [-1, -2], [-1, -2], [-1, -2])
    old = new - t([0.5, 0.2], [-0.5, -0.2], [0.5, 0.2], [-0.5, -0.2])
    mask, weight = torch.ones(4, 2), t(1, 1, 1, math.exp(-0.7))
    gain = t(2, 0.5, -2, -3)
    wider = [torch.cat([part, torch.zeros(4, 3)], 1) for part in (new, old, mask)]
    loss, metrics, grad = loss_of(m, *wider[:2], gain, wider[2], ratio="tapered")
    assert (grad[:, 2:] == 0).all()
    grad = grad[:, :2]
    close(loss, 3 * (weight * gain).mean())
    close(grad, (-weight * gain / 4)[:, None].expand(4, 2))
    for name in ("clip_low", "clip_high", "clip_dual"):
        close(metrics[name], 0, 0)
    close(metrics["ratio_max"], math.exp(0.7))
    mask = t([1, 1], [1, 0], [1, 1], [0, 0])
    loss, metrics, grad = loss_of(m, new, old, gain, mask, ratio="none")
    close(loss, (6 + 0.5 - 6) / 4)
    close(grad, -mask * gain[:, None] / 4)
    close(metrics["clip_high"] + metrics["clip_low"] + metrics["clip_dual"], 0, 0)
    close(metrics["ratio_mean"], sum(math.exp(x) for x in (0.5, 0.2, -0.5, 0.5, 0.2)) / 5)


def golden_aggregation(m: ModuleType) -> None:
    """Vector 10 as corrected: lengths 4 and 7 of 7, advantage 2; and two rows with one token of loss 10."""
    mask = torch.arange(7)[None, :] < torch.tensor([4, 7])[:, None]
    new, gain = -torch.rand(2, 7, dtype=torch.float64), t(2, 2)
    table = [
        ("seq-mean-token-mean", 2.0, (0.25, 1 / 7)),
        ("seq-mean-token-sum-norm", (8 / 7 + 2) / 2, (1 / 7, 1 / 7)),
        ("token-mean", 2.0, (2 / 11, 2 / 11)),
        ("seq-mean-token-sum", 11.0, (1.0, 1.0)),
    ]
    for aggregate, wanted, (short, long) in table:
        loss, _, grad = loss_of(m, new, None, gain, mask, aggregate=aggregate, norm_length=7)
        close(loss, -wanted)
        close(grad, -torch.where(mask, t(short, long)[:, None], 0.0))
    rows = torch.ones(2, 10, dtype=torch.float64)
    rows[0, 4] = rows[1, 9] = 10
    mask = torch.arange(10)[None, :] < torch.tensor([5, 10])[:, None]
    close(m.aggregated(rows, mask, aggregate="seq-mean-token-mean"), 2.35)
    close(m.aggregated(rows, mask, aggregate="token-mean"), 2.2)
    close(m.aggregated(rows, mask), 33 / 2)
    close(m.aggregated(rows, mask, num_sequences=4), 33 / 4)
    close(m.aggregated(rows, mask, aggregate="token-mean", num_tokens=torch.tensor(30)), 33 / 30)


def golden_first_step(m: ModuleType) -> None:
    """At ratio 1 the gradient is -A grad log pi in every mode, even between bounds of no width; masked tokens none."""
    given = batch()
    new, gain, mask = given["logprobs_BT"], given["advantage"], given["mask_BT"]
    length = mask.sum(1, keepdim=True).clamp(min=1).double()
    each = {
        "seq-mean-token-sum": torch.full_like(gain, 1 / 6)[:, None],
        "seq-mean-token-sum-norm": torch.full_like(gain, 1 / 42)[:, None],
        "seq-mean-token-mean": 1 / (6 * length),
        "token-mean": torch.full_like(gain, 1.0)[:, None] / mask.sum(),
    }
    for ratio in RATIOS:
        for aggregate in AGGREGATES:
            share = (
                each[aggregate] if ratio in ("token", "none") else 1 / 6 / (length if ratio == "sequence-mean" else 1)
            )
            for old in (None, new):
                options = {"ratio": ratio, "clip_low": 0.0, "clip_high": 0.0, "aggregate": aggregate, "norm_length": 7}
                _, metrics, grad = loss_of(m, new, old, gain, mask, **options)
                close(grad, torch.where(mask, -gain[:, None] * share, 0.0))
                assert float(metrics["ratio_max"]) == 1
                close(metrics["ratio_mean"], 1, 1e-15)
                close(metrics["approx_kl"], 0, 0)


def golden_masked(m: ModuleType) -> None:
    """NaN and infinities under the mask, or as the advantage of a row wholly under it, change no bit of anything."""
    given = batch(1)
    hidden = ~given["mask_BT"]
    for ratio in RATIOS:
        for kl in ("full", "k2", "k3"):
            clean = graded(m, given, ratio=ratio, **{**ALL_ON, "kl": kl})
            for poison in (NAN, INF, -INF):
                dirty = {name: torch.where(hidden, poison, value) if value.dim() == 2 else value for name, value in given.items()}  # fmt: skip
                dirty["mask_BT"] = given["mask_BT"].long()
                dirty["advantage"] = torch.where(hidden.all(1), poison, given["advantage"])
                loss, metrics, grads = graded(m, dirty, ratio=ratio, **{**ALL_ON, "kl": kl})
                close(loss, clean[0], 0)
                for name, value in metrics.items():
                    close(value, clean[1][name], 0)
                for grad, wanted in zip(grads, clean[2], strict=True):
                    close(grad, wanted, 0)
                    assert (grad[hidden] == 0).all()
        if ratio in ("token", "none"):
            wide = {**given, "advantage": given["advantage"][:, None].expand(6, 5)}
            dirty = {**wide, "advantage": torch.where(hidden, NAN, wide["advantage"])}
            close(graded(m, dirty, ratio=ratio)[0], graded(m, wide, ratio=ratio)[0], 0)


def split_check(m: ModuleType, given: dict[str, Tensor], cuts: list[int], **options: Any) -> None:
    """The parts' losses, gradients and metrics add up to those of the whole (the greatest ratio is the greatest)."""
    rows = len(given["mask_BT"])
    totals = {"num_sequences": rows, "num_tokens": int(given["mask_BT"].sum())}
    whole, metrics, grads = graded(m, given, **options)
    edges = [0, *sorted(cuts), rows]
    parts = [
        graded(m, {name: value[a:b] for name, value in given.items()}, **options, **totals) for a, b in pairwise(edges)
    ]
    close(sum(part[0] for part in parts), whole)
    for place, grad in enumerate(grads):
        close(torch.cat([part[2][place] for part in parts]), grad)
    for name, value in metrics.items():
        together = [part[1][name] for part in parts]
        close(max(together) if name == "ratio_max" else sum(together), value, 1e-6)


def golden_micro_batches(m: ModuleType) -> None:
    """Cut after the row wholly under the mask, which alone is a micro-batch too, in every mode; an empty one is one."""
    given = batch(2)
    for ratio in RATIOS:
        for aggregate in AGGREGATES:
            for cuts in ([1, 2], [3], [0, 4]):
                split_check(m, given, cuts, ratio=ratio, aggregate=aggregate, **ALL_ON)


def golden_rollout_weights(m: ModuleType) -> None:
    """Weights min(old / rollout, cap): per token, per sequence, or their mean; constants; cap 2 unless given."""
    old = t([-1, -1, -1], [-2, -2, -2])
    change = t([math.log(3), math.log(0.5), 9], [math.log(1.5), math.log(1.2), math.log(0.9)])
    mask, gain = t([1, 1, 0], [1, 1, 1]), t(1, -1)
    rollout = old - change
    per_token = t([2, 0.5, 0], [1.5, 1.2, 0.9])
    for given in (old, None):
        loss, metrics, grad = loss_of(m, old, given, gain, mask, rollout_logprobs_BT=rollout)
        close(grad, -per_token * gain[:, None] / 2)
        close(loss, (-2.5 + 3.6) / 2)
        close(metrics["rollout_weight"], 6.1 / 5)
        close(metrics["rollout_truncated"], 0.2, 1e-6)
    _, metrics, grad = loss_of(m, old, old, gain, mask, rollout_logprobs_BT=rollout, rollout_cap=1.3)
    close(grad, -t([1.3, 0.5, 0], [1.3, 1.2, 0.9]) * gain[:, None] / 2)
    close(metrics["rollout_truncated"], 0.4, 1e-6)
    for ratio, weights in (
        ("sequence", (1.5, 1.6)),
        ("tapered", (1.5, 1.6)),
        ("sequence-mean", (1.5**0.5, 1.62 ** (1 / 3))),
    ):
        _, metrics, grad = loss_of(m, old, old, gain, mask, ratio=ratio, rollout_logprobs_BT=rollout, rollout_cap=1.6)
        close(metrics["rollout_weight"], sum(weights) / 2)
        close(metrics["rollout_truncated"], 0.0 if ratio == "sequence-mean" else 0.5, 0)
        share = 1 / mask.sum(1, keepdim=True) if ratio == "sequence-mean" else 1
        close(grad, -mask * (t(*weights) * gain)[:, None] / 2 * share)
    exact = loss_of(m, old[:, :1], old[:, :1], gain, mask[:, :1], rollout_logprobs_BT=old[:, :1], rollout_cap=1.0)
    close(exact[1]["rollout_truncated"], 0, 0)
    plain = loss_of(m, old, old, gain, mask)
    assert "rollout_weight" not in plain[1]
    kl = {"ref_logprobs_BT": old - 1, "kl": "k3", "kl_coef": 0.5}
    extra = [loss_of(m, old, old, gain, mask, **kl, **w)[0] for w in ({}, {"rollout_logprobs_BT": rollout})]
    close(extra[0] - plain[0], extra[1] - (-2.5 + 3.6) / 2)


def golden_kl_and_entropy(m: ModuleType) -> None:
    """Both are aggregated as told whatever the ratio, added and taken away, and their references are constants."""
    new, ref = t([math.log(0.3), -1], [-2, -3]), t([math.log(0.2), -1.5], [-1.0, -7])
    mask, zero = t([1, 1], [1, 0]), t(0, 0)
    d = ref - new
    values = {"k2": d**2 / 2, "k3": d.exp() - 1 - d, "full": t([0.1, 0.2], [0.4, 9])}
    slopes = {"k2": -d, "k3": 1 - d.exp(), "full": torch.zeros(2, 2, dtype=torch.float64)}
    close(values["k2"][0, 0], 0.082201, 1e-6)
    close(values["k3"][0, 0], 0.072132, 1e-6)
    weights = [t([0.5, 0.5], [0.5, 0]), t([0.1, 0.1], [0.1, 0]), t([0.25, 0.25], [0.5, 0]), mask / 3]
    for ratio in RATIOS:
        for aggregate, weight in zip(AGGREGATES, weights, strict=True):
            options = {"ratio": ratio, "aggregate": aggregate, "norm_length": 5}
            for kl, value in values.items():
                reference = ref.clone().requires_grad_()
                given = {"full_kl_BT": value} if kl == "full" else {"ref_logprobs_BT": reference}
                loss, metrics, grad = loss_of(m, new, new, zero, mask, kl=kl, kl_coef=0.3, **given, **options)
                close(loss, 0.3 * (weight * value).sum())
                close(grad, 0.3 * weight * slopes[kl])
                close(metrics["ref_kl"], (mask * value).sum() / 3)
                close(metrics["policy_loss"], 0)
                assert reference.grad is None
            entropy = values["full"].clone().requires_grad_()
            loss, metrics, _ = loss_of(m, new, None, zero, mask, entropy_BT=entropy, entropy_coef=0.3, **options)
            close(loss, -0.3 * (weight * values["full"]).sum())
            assert entropy.grad is not None
            close(entropy.grad, -0.3 * weight)
            close(metrics["entropy"], 0.7 / 3)
    silent = loss_of(m, new, None, zero, mask, ref_logprobs_BT=ref, entropy_BT=values["full"] * INF)
    close(silent[0], 0, 0)
    close(silent[1]["ref_kl"], (mask * values["k3"]).sum() / 3)
    close(loss_of(m, new, None, zero, mask, full_kl_BT=values["full"])[1]["ref_kl"], 0.7 / 3)
    assert not {"ref_kl", "entropy"} & set(loss_of(m, new, None, zero, mask)[1])


def golden_constants(m: ModuleType) -> None:
    """Only the new log-probabilities, the full KL and the entropy carry gradients."""
    given = batch(3)
    for ratio in RATIOS:
        names = ("old_logprobs_BT", "advantage", "rollout_logprobs_BT", "ref_logprobs_BT")
        leaves = {name: given[name].clone().requires_grad_() for name in names}
        graded(m, {**given, **leaves}, ratio=ratio, kl="k3", kl_coef=0.1)
        assert all(leaf.grad is None for leaf in leaves.values()), ratio


def golden_extremes(m: ModuleType) -> None:
    """Log-ratios are cut at 20 either way, so that neither loss nor gradient overflows; a NaN that counts is told."""
    near, far = t([-1.0]), t([-1001.0])
    for ratio in ("token", "sequence", "sequence-mean"):
        for new, old, gain, wanted in ((near, far, 1, -1.2), (near, far, -1, math.exp(20)), (far, near, 1, -math.exp(-20)), (far, near, -1, 0.8)):  # fmt: skip
            loss, _, grad = loss_of(m, new, old, t(gain), torch.ones(1, 1), ratio=ratio)
            close(loss / wanted, 1)
            close(grad, t([0.0]), 0)
        assert loss_of(m, near * NAN, near, t(1), torch.ones(1, 1), ratio=ratio)[0].isnan()
    half = loss_of(m, near.bfloat16(), near.bfloat16(), t(1.1), torch.ones(1, 1))
    assert half[0].dtype == torch.float32
    close(half[0], -1.1, 1e-6)


def golden_nothing(m: ModuleType) -> None:
    """Nothing but masked rows, no tokens and no rows are a loss of exactly 0 with a gradient of 0."""
    for rows, length in ((2, 3), (2, 0), (0, 3)):
        new = torch.full((rows, length), NAN, dtype=torch.float64)
        mask = torch.zeros(rows, length)
        for ratio in RATIOS:
            for aggregate in AGGREGATES:
                options = {
                    "ratio": ratio,
                    "aggregate": aggregate,
                    "norm_length": 3,
                    "entropy_BT": new,
                    "entropy_coef": 1,
                }
                loss, metrics, grad = loss_of(m, new, new, torch.full((rows,), NAN), mask, **options)
                close(loss, 0, 0)
                close(grad, torch.zeros(rows, length), 0)
                assert all(value.isfinite() and value.dim() == 0 for value in metrics.values())
    low = loss_of(m, t([-2, -9]), t([-1, -1]), t(1), t([1, 0]))[1]
    close(low["ratio_max"], math.exp(-1))
    close(low["ratio_mean"], math.exp(-1))


def golden_warning(m: ModuleType) -> None:
    """Eq. 17 warns as its paper does, and nothing else does."""
    given = {name: batch()[name] for name in ("logprobs_BT", "old_logprobs_BT", "advantage", "mask_BT")}
    for ratio in RATIOS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            m.policy_loss(**given, ratio=ratio)
        assert len(caught) == (ratio == "sequence")
        for warning in caught:
            assert "(eq. 17)" in str(warning.message) and "collapse" in str(warning.message)
            assert Path(warning.filename).stem == "loss_golden", "the warning points at the caller"


def golden_trpo(m: ModuleType) -> None:
    """Eq. 9: no clip on either side, and the coefficient times the whole KL."""
    old, mask = t([-1, -2], [-1, -2]), t([1, 1], [1, 0]).bool()
    new = (old + t([3.0, -3.0], [-3.0, 0])).requires_grad_()
    kl = t([0.5, 0.25], [0.125, 9]).requires_grad_()
    loss, metrics = m.trpo_loss(new, old, t(1, -1), mask, kl, kl_coef=2.0)
    close(loss.detach(), (-math.exp(3) - math.exp(-3) + math.exp(-3)) / 2 + 2 * 0.875 / 2)
    loss.backward()
    close(kl.grad, t([1, 1], [1, 0]))
    close(new.grad, t([-math.exp(3), -math.exp(-3)], [math.exp(-3), 0]) / 2)
    close(metrics["old_kl"], 0.875 / 3)
    assert "ref_kl" not in metrics
    part, _ = m.trpo_loss(new, old, t(1, -1), mask, kl, kl_coef=2.0, num_sequences=4)
    close(part.detach(), loss.detach() / 2)


def golden_refusals(m: ModuleType) -> None:
    """What cannot be meant is an error that says why, not a number."""
    x, a, mask = t([-1, -2]), t(1), torch.ones(1, 2, dtype=torch.bool)
    wide = {"advantage": x}
    table: list[tuple[dict, str]] = [
        ({"kl": "k1", "ref_logprobs_BT": x}, "gradient of mean zero"),
        ({"kl": "k4"}, "kl must be"),
        ({"kl_coef": 0.1}, "kl_coef needs"),
        ({"kl": "k2", "full_kl_BT": x}, "needs ref_logprobs_BT"),
        ({"kl": "k3"}, "needs ref_logprobs_BT"),
        ({"kl": "full", "ref_logprobs_BT": x}, "needs full_kl_BT"),
        ({"entropy_coef": 0.1}, "needs entropy_BT"),
        ({"ratio": "tokens"}, "ratio must be"),
        ({"aggregate": "mean"}, "aggregate must be"),
        ({"aggregate": "seq-mean-token-sum-norm"}, "norm_length above 0"),
        ({"aggregate": "seq-mean-token-sum-norm", "norm_length": 0}, "norm_length above 0"),
        ({"clip_low": -0.1}, "not be negative"),
        ({"clip_high": -0.1}, "not be negative"),
        ({"clip_high": NAN}, "not be negative"),
        ({"dual_clip": 1.0}, "dual_clip must be"),
        ({"dual_clip": 3.0, "ratio": "none"}, "dual_clip must be"),
        ({"dual_clip": 3.0, "ratio": "tapered"}, "dual_clip must be"),
        ({"rollout_cap": 2.0}, "rollout_cap must be"),
        ({"rollout_cap": 0.0, "rollout_logprobs_BT": x}, "rollout_cap must be"),
        ({"ratio": "sequence", **wide}, "one term per sequence"),
        ({"ratio": "sequence-mean", **wide}, "one term per sequence"),
        ({"ratio": "tapered", **wide}, "one term per sequence"),
        ({"advantage": t([1])}, "must be B or BT"),
        ({"old_logprobs_BT": t(-1, -2)}, "one shape BT"),
        ({"entropy_BT": t([1])}, "one shape BT"),
        ({"logprobs_BT": x[0], "old_logprobs_BT": x[0], "mask_BT": mask[0]}, "one shape BT"),
    ]
    for change, why in table:
        given: dict[str, Any] = {"logprobs_BT": x, "old_logprobs_BT": x, "advantage": a, "mask_BT": mask, **change}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                m.policy_loss(**given)
        except ValueError as error:
            assert why in str(error), error
            continue
        raise AssertionError(f"accepted: {change}")
    m.policy_loss(x, None, a, mask, clip_low=0.0, clip_high=INF, dual_clip=1.1, aggregate="seq-mean-token-sum-norm", norm_length=1)  # fmt: skip
    m.policy_loss(x, None, a, mask, rollout_logprobs_BT=x, rollout_cap=1)


def kl_estimates(m: ModuleType) -> None:
    """Vector 8: the estimates at one token, their means over p, and both directions of the exact KL."""
    p, ref = t(0.3, 0.2).log()
    close(m.k1(p, ref), 0.405465, 1e-6)
    close(m.k2(p, ref), 0.082201, 1e-6)
    close(m.k3(p, ref), 0.072132, 1e-6)
    one, two = t(0.5, 0.3, 0.2).log(), t(0.4, 0.2, 0.4).log()
    close(m.full_kl(one[None, None], two[None, None]), t([0.094582]), 1e-6)
    close(m.full_kl(two, one), 0.106908, 1e-6)
    for estimate in (m.k1, m.k3):
        close((one.exp() * estimate(one, two)).sum(), 0.094582, 1e-6)
    close(m.k3(t(-50.0), t(-1.0))[0], math.exp(20) - 21, 1e-4)


def kl_full_at_zero(m: ModuleType) -> None:
    """A token that p cannot draw adds nothing, nor a NaN to the gradient; one that only q cannot draw is infinite."""
    logits = t(0.5, 0.5, -INF).log_softmax(-1).requires_grad_()
    other = t(0.1, 0.9, -INF).log_softmax(-1)
    kl = m.full_kl(logits, other)
    wanted = 0.5 * (math.log(0.5) * 2 - float(other[0]) - float(other[1]))
    close(kl.detach(), wanted)
    kl.backward()
    assert logits.grad is not None
    close(logits.grad, t(*(0.5 * (math.log(0.5) - float(q) + 1) for q in other[:2]), 0.0))
    close(m.full_kl(t(0.5, 0.5).log(), t(0.0, 1.0).log()), INF)


def kl_in_the_reward(m: ModuleType) -> None:
    """Eq. 12: minus the coefficient times the log-ratio, a constant, nothing under the mask; and its controller."""
    new = t([-1.0, -2.0, NAN]).requires_grad_()
    got = m.reward_kl(new, t([-1.5, -1.0, INF]), torch.tensor([[True, True, False]]), kl_coef=0.2)
    close(got, t([-0.1, 0.2, 0.0]))
    assert not got.requires_grad
    for kl, wanted in ((0.31, 0.2), (0.3, 0.1), (0.2, 0.1), (0.134, 0.1), (0.133, 0.05)):
        close(m.adapted_kl_coef(0.1, kl, target=0.2), wanted, 1e-15)
    close(m.adapted_kl_coef(0.1, 1.5, target=1.0), 0.1, 0)
    close(m.adapted_kl_coef(0.1, 2.0, target=3.0), 0.1, 0)
    close(m.adapted_kl_coef(0.1, 0.1, target=0.5), 0.05, 0)
    for target in (0.0, -1.0, NAN):
        try:
            m.adapted_kl_coef(0.1, 0.2, target=target)
        except ValueError:
            continue
        raise AssertionError("accepted")


def value_gae(m: ModuleType) -> None:
    """Vector 5, also with NaN under the mask on both sides and a hole, and its gradient-free result."""
    reward, value = t(0, 0, 0, 1), t(0.5, 0.6, 0.4, 0.8)
    table = [
        (1, 1, (0.5, 0.4, 0.6, 0.2)),
        (1, 0.95, (0.442475, 0.3605, 0.59, 0.2)),
        (1, 0, (0.1, -0.2, 0.4, 0.2)),
        (0.9, 0.8, (0.107738, 0.09408, 0.464, 0.2)),
    ]
    places = [1, 2, 4, 5]
    wide_reward, wide_value = torch.full((2, 7), NAN, dtype=torch.float64), torch.full((2, 7), INF, dtype=torch.float64)
    wide_reward[0, places], wide_value[0, places] = reward, value
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, places] = True
    for gamma, lam, wanted in table:
        advantage, returns = m.gae(wide_reward, wide_value.requires_grad_(), mask, gamma=gamma, lam=lam)
        close(advantage[0, places], t(*wanted), 1e-6)
        close(returns[0, places], t(*wanted) + value, 1e-6)
        assert (advantage[~mask] == 0).all() and (returns[~mask] == 0).all() and not returns.requires_grad
    close(m.gae(reward[None], value[None], torch.ones(1, 4))[0][0], t(*table[1][2]), 1e-6)
    empty = torch.zeros(2, 0)
    assert m.gae(empty, empty, empty.bool())[0].shape == (2, 0)
    try:
        m.gae(reward[:, None], value[None], mask[:1, :4].long())
    except ValueError:
        return
    raise AssertionError("broadcast")


def value_clipped(m: ModuleType) -> None:
    """The greater of both errors, halved; no gradient where the clipped one is; sums over tokens unless told."""
    value = t([1.0, 2.0, 0.2, NAN]).requires_grad_()
    old, returns = t([0.9, 1.0, 1.0, NAN]), t([2.0, 0.0, 0.1, NAN])
    mask = torch.tensor([[True, True, True, False]])
    loss, metrics = m.value_loss(value, returns, mask, old_value_BT=old, clip=0.25)
    close(loss.detach(), (1 + 4 + 0.65**2) / 2)  # inside; outside, but the further error is the plain one; clipped
    loss.backward()
    close(value.grad, t([-1, 2, 0, 0]))
    close(metrics["value_clip"], 1 / 3)
    close(metrics["value_loss"], loss.detach(), 0)
    assert not any(metric.requires_grad for metric in metrics.values())
    for bound in (0.25, 0.28 - 0.03):  # 0.28 + (0.03 - 0.28) is above 0.03 by rounding: inside, so not clipped
        inside = m.value_loss(t([0.03]), t([0.0]), mask[:, :1], old_value_BT=t([0.28]), clip=bound)
        close(inside[1]["value_clip"], 0, 0)
    even = m.value_loss(t([1.5]), t([1.0]), mask[:, :1], old_value_BT=t([0.0]), clip=0.5)
    close(even[1]["value_clip"], 0, 0)
    value.grad = None
    loss, metrics = m.value_loss(value, returns, mask, aggregate="token-mean", num_tokens=6)
    close(loss.detach(), (1 + 4 + 0.01) / 12)
    loss.backward()
    close(value.grad, t([-1, 2, 0.1, 0]) / 6)
    close(metrics["value_clip"], 0, 0)
    half = m.value_loss(value, returns, mask, num_sequences=2, num_tokens=6, old_value_BT=old, clip=0.25)
    close(half[1]["value_clip"], 1 / 6)
    close(half[0].detach(), (5 + 0.65**2) / 4)
    close(m.value_loss(value, returns, mask, aggregate="seq-mean-token-sum-norm", norm_length=5)[0].detach(), 5.01 / 10)
    for wrong in (
        {"clip": 0.2},
        {"clip": 0.0, "old_value_BT": old},
        {"return_BT": returns[:, :1]},
        {"old_value_BT": t(1)},
    ):
        try:
            m.value_loss(**{"value_BT": value, "return_BT": returns, "mask_BT": mask, **wrong})
        except ValueError:
            continue
        raise AssertionError("accepted")


def _checks(prefix: str) -> list[Any]:
    return [value for name, value in sorted(globals().items()) if name.startswith(prefix)]


LOSS, KL, VALUE = _checks("golden_"), _checks("kl_"), _checks("value_")
