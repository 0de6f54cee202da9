"""A model shared out among the processes of a run (FSDP2): weights, gradients and what the optimizer keeps of each.

Every weight is a DTensor of which a process holds its rows. A pass gathers one layer at a time; what stands outside the
layers (embeddings, head, the last norm) is one unit, whole from the beginning of a pass to the end of its backward.
Nothing here does anything to a model that is not shared out, but for `shard`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from grape.errors import ConfigError, GrapeError, one_line
from grape.policy import causal_lm

T = TypeVar("T")
WHERE = "policy.shard"
NEEDED = ("reset_iter_state", "set_force_sum_reduction_for_comms")  # of torch 2.13


def shard(model: Any, device: torch.device, processes: int) -> None:
    """Share a model out, in place and onto ``device``; all processes do it, each with the same weights.

    Gradients will be summed over the processes. Raises `ConfigError` for a model that cannot be shared out.
    """
    if missing := [name for name in NEEDED if not hasattr(FSDPModule, name)]:
        raise ConfigError(f"{WHERE}: needs torch 2.13 or later: {torch.__version__} has no {missing[0]}")
    mesh = init_device_mesh(device.type, (processes,))
    try:
        for layer in reversed(layers(model)):  # what is in a layer before the layer
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    except ValueError as error:
        raise ConfigError(f"{WHERE}: {type(causal_lm(model)).__name__}: {one_line(error)}") from error
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo takes an average for a sum, and knows no scaled one
    model.through = lambda work: work()
    register_fsdp_forward_method(model, "through")
    check_shared(model)
    through(model, lambda: None)  # the first pass decides which unit is the root
    release(model)


def layers(model: Any) -> list[Any]:
    """The modules that transformers would not split."""
    inner = causal_lm(model)
    names = set(inner._no_split_modules or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ConfigError(f"{WHERE}: {type(inner).__name__} does not say what its layers are")
    return found


def units(model: Any) -> list[FSDPModule]:
    """The modules whose weights are gathered together, none where the model is not shared out."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_shared(model: Any) -> bool:
    """Whether processes share the model out."""
    return isinstance(model, FSDPModule)


def check_shared(model: Any) -> None:
    """Raise `GrapeError` where a weight is not a DTensor."""
    whole = [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    if whole:
        raise GrapeError(f"{WHERE}: {len(whole)} weights are not shared out, such as {whole[0]}")


def through(model: Any, work: Callable[[], T]) -> T:
    """What ``work`` returns, tensors or tuples of them: a pass over the model, or over parts of it outside `forward`.

    What it returns must be all that a loss is made of. After a pass without gradients the outer unit stays whole until
    `release`.
    """
    if not isinstance(model, FSDPModule):
        return work()
    done: T = getattr(model, "through")(work)  # noqa: B009  # `shard` has put it there
    return done


def release(model: Any) -> None:
    """Let go of what is still whole after passes without gradients."""
    if isinstance(model, FSDPModule):
        model.reset_iter_state()


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """All weights in every process, for passes without gradients: as many as each process likes, since none gathers."""
    parts = units(model)
    try:
        for unit in parts:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        for unit in parts:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
        release(model)


def clipped(weights: Sequence[Tensor], limit: float) -> float:
    """The norm of all gradients, shared out or not, which are then scaled so that it is at most ``limit``."""
    kinds = [[weight for weight in weights if isinstance(weight, DTensor) == kind] for kind in (True, False)]
    parts = [part for part in kinds if part]
    norms = [torch.nn.utils.get_total_norm([w.grad for w in part if w.grad is not None]) for part in parts]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for part in parts:
        torch.nn.utils.clip_grads_with_norm_(part, limit, norm)
    return norm.item()


def full(tensor: Tensor, *, keep: bool) -> Tensor:
    """The whole of a tensor, on the CPU where it was shared out; nothing of it in a process that is not to ``keep`` it.

    All processes ask for the same tensors in the same order.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    gathered: Tensor = tensor.full_tensor().detach()
    return gathered.cpu() if keep else gathered.new_empty(0)


def full_weights(model: Any, *, keep: bool) -> dict[str, Tensor] | None:
    """The weights that are saved, by name, as `full` has them; None where the model is not shared out."""
    if not isinstance(model, FSDPModule):
        return None
    parts = model.state_dict()  # type: ignore[attr-defined]
    weights = dict(model.named_parameters(remove_duplicate=False))  # type: ignore[attr-defined]
    if hasattr(model, "peft_config"):
        parts = {name: part for name, part in parts.items() if name in weights and weights[name].requires_grad}
    found: dict[int, Tensor] = {}  # a weight with two names is gathered once, and stays one
    for name, part in parts.items():
        one = weights.get(name, part)
        if id(one) not in found:
            found[id(one)] = full(one, keep=keep)
        parts[name] = found[id(one)]
    return dict(parts)


def full_state(state: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """An optimizer's ``state_dict()`` with tensors as `full` has them: the same however many processes there are."""
    slots = {
        number: {name: full(value, keep=keep) for name, value in some.items()}
        for number, some in state["state"].items()
    }
    return {**state, "state": slots}


def own_state(state: Mapping[str, Any], weights: Sequence[Tensor]) -> dict[str, Any]:
    """The part of a `full_state` that belongs to this process, for ``weights`` in the optimizer's order."""

    def own(value: Tensor, number: int) -> Tensor:
        weight = weights[number] if number < len(weights) else None
        if not isinstance(weight, DTensor) or value.shape != weight.shape:
            return value
        at = value.to(weight.device)
        return distribute_tensor(at, weight.device_mesh, weight.placements, src_data_rank=None)

    slots = {
        number: {name: own(value, number) for name, value in some.items()} for number, some in state["state"].items()
    }
    return {**state, "state": slots}
