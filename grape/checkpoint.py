"""What a run leaves on disk to go on from: checkpoints of whole steps, and a journal of the steps since the last one.

A checkpoint is a folder `step-000050` that `load_policy` reads, with the optimizer's state beside the weights. The
journal holds each step's rollouts and verdicts from before its update, so that no step is sampled or judged twice.
Both appear under their names only when they are whole.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grape.config import CheckpointConfig
from grape.errors import ConfigError, one_line
from grape.policy import Policy, save_policy
from grape.step import Step

logger = logging.getLogger("grape")


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint: the step after which it was made, the position in the order of questions, the folder."""

    step: int
    position: int
    folder: Path

    def optimizer(self) -> dict[str, Any]:
        """The state of the optimizer."""
        path = self.folder / "optimizer.pt"
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, struct.error, pickle.UnpicklingError) as error:
            raise ConfigError(f"{path}: no optimizer's state: {one_line(error)}") from error
        return state


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a checkpoint holds: the optimizer's state; and the weights, where the model has but a part of them."""

    weights: dict[str, Tensor] | None
    optimizer: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in its folder. What cannot be written is a `ConfigError` of one line."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self.folder = Path(config.dir)
        self._journal = self.folder / "journal"

    def check(self, run: str, identity: Mapping[str, str], *, resume: bool, allow_changes: bool) -> str:
        """The name of the run that this folder is to hold: ``run``, or the one that is resumed. Nothing is written.

        ``identity`` holds a hash of each part that decides the result. A part that changed since is an error, unless
        allowed.
        """
        file = self.folder / "run.json"
        if file.is_file():
            known = _read(file)
            if not resume:
                raise ConfigError(
                    f"{self.folder}: holds run {known['run']} already: --resume goes on with it, another "
                    "checkpoint.dir begins anew"
                )
            changed = sorted(
                part for part in {*identity, *known["identity"]} if identity.get(part) != known["identity"].get(part)
            )
            if changed and not allow_changes:
                raise ConfigError(
                    f"{self.folder}: changed since run {known['run']} began: {', '.join(changed)}; "
                    "--allow-changes goes on all the same"
                )
            run = known["run"]
        elif resume:
            logger.warning("%s: nothing to resume: no run has begun there; a new one begins", self.folder)
        return run

    def claim(self, run: str, identity: Mapping[str, str]) -> None:
        """Hold this run from now on, without what a kill has left half done."""
        try:
            self._journal.mkdir(parents=True, exist_ok=True)
            self._tidy()
            _write(self.folder / "run.json", json.dumps({"run": run, "identity": dict(identity)}, indent=1).encode())
        except OSError as error:
            raise ConfigError(f"{self.folder}: {error.strerror}") from error

    def latest(self) -> Saved | None:
        """The last checkpoint."""
        found = sorted(self.folder.glob("step-*"))
        if not found:
            return None
        state = _read(found[-1] / "state.json")
        return Saved(step=state["step"], position=state["position"], folder=found[-1])

    def save(self, step: int, position: int, policy: Policy, state: State) -> Path:
        """Write a checkpoint, then drop the oldest ones and the journal of the steps that it covers."""
        folder = self.folder / f"step-{step:06d}"
        draft = self.folder / f".{folder.name}"
        try:
            self._tidy()
            save_policy(policy, draft, state.weights)
            torch.save(state.optimizer, draft / "optimizer.pt")
            (draft / "state.json").write_text(json.dumps({"step": step, "position": position}))
            draft.rename(folder)
            self._tidy()
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError on a full disk
            raise ConfigError(f"{folder}: cannot be written: {one_line(error)}") from error
        return folder

    def keep(self, step: Step) -> None:
        """Put a judged step into the journal."""
        path = self._journal / f"step-{step.number:06d}.json"
        try:
            _write(path, step.dump())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error

    def judged(self, number: int) -> Step | None:
        """A step of the journal."""
        path = self._journal / f"step-{number:06d}.json"
        return Step.read(path.read_bytes()) if path.is_file() else None

    def _tidy(self) -> None:
        """Drop drafts, the checkpoints that are too old to be kept, and the journal of steps that the last one has."""
        for draft in self.folder.glob(".step-*"):
            shutil.rmtree(draft)
        found = sorted(self.folder.glob("step-*"))
        for old in found[: -self.config.keep]:
            shutil.rmtree(old)
        for path in self._journal.glob("step-*.json"):
            if found and path.stem <= found[-1].name:
                path.unlink()


def _read(path: Path) -> dict[str, Any]:
    """A file that `_write` or `save` has left; `ConfigError` where something has happened to it since."""
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: damaged: {one_line(error)}") from error
    return data


def _write(path: Path, data: bytes) -> None:
    """The whole file or none of it."""
    draft = path.with_name(f".{path.name}")
    draft.write_bytes(data)
    draft.replace(path)
