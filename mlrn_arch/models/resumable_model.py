"""A `SRModel` whose run cannot be lost: whole files, exact resumes, stops that save."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import random
import signal
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger

from mlrn_arch.compat import newest_states
from mlrn_arch.data import ResumableSampler
from mlrn_arch.errors import UserError

# What decides the course of a run; machines may differ in the rest (workers, pinned memory).
COMPARED = (
    "scale",
    "manual_seed",
    "world_size",
    "network_g",
    "network_t",
    "datasets:train",
    "train",
)
NOT_FINISHED = 75  # sysexits.h's "try again later", the exit code of --time_limit
TIME_IS_UP = 14  # in place of a signal's number; SIGALRM's, where a system has it
NOT_COMPARED = ("num_worker_per_gpu", "prefetch_mode", "pin_memory", "dataroot_gt", "dataroot_lq")


class ResumableModel(SRModel):
    """The saving, stopping and resuming of `FastSRModel`, which trains with it."""

    sampler: ResumableSampler | None = None  # set by `mlrn train`; its position is saved
    stop_signal = 0  # of the process, so of the class
    samples_seen = 0

    def __init__(self, opt: dict[str, Any]) -> None:
        self.started_with = {
            key: copy.deepcopy(value) for key in COMPARED if (value := _get(opt, key)) is not None
        }
        super().__init__(opt)

    def save(self, epoch: int, current_iter: int) -> None:
        """Write the networks and the training state, each of them whole or not at all.

        Args:
            epoch: The running epoch.
            current_iter: Steps done; -1 writes `net_g_latest.pth` alone, as BasicSR does.
        """
        self._check_finite()
        if self.opt["rank"] != 0:
            return
        if current_iter == -1:
            self._write(self._networks(), self._model_path("latest"))
            return
        state = {
            "epoch": epoch,
            "iter": current_iter,
            "optimizers": [self.optimizer_g.state_dict()],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self.scaler.state_dict(),
            "samples_seen": self.samples_seen,
            "best_metric_results": _plain(getattr(self, "best_metric_results", None)),
            "rng": _random_states(),
            "started_with": _plain(self.started_with),
        }
        # The network first: a state without its network could not be resumed.
        if self._write(self._networks(), self._model_path(current_iter)) and self._write(
            state, self._state_path(current_iter)
        ):
            self._prune()

    def _networks(self) -> dict[str, dict[str, torch.Tensor]]:
        networks = {"params": self.get_bare_model(self.net_g)}
        if hasattr(self, "net_g_ema"):
            networks["params_ema"] = self.net_g_ema
        return {
            key: {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
            for key, net in networks.items()
        }

    def _model_path(self, name: int | str) -> str:
        return os.path.join(self.opt["path"]["models"], f"net_g_{name}.pth")

    def _state_path(self, current_iter: int) -> str:
        return os.path.join(self.opt["path"]["training_states"], f"{current_iter}.state")

    @staticmethod
    def _write(content: dict[str, Any], path: str) -> bool:
        """Write a file so that it is there whole or not at all; False if there was no room."""
        buffer = io.BytesIO()
        torch.save(content, buffer)
        part = f"{path}.part"
        try:
            with open(part, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(part)
            get_root_logger().error(
                f"Could not save {path}: {error.strerror}. The run goes on; what was saved before "
                "is kept. Make room: the next save tries again."
            )
            return False
        with contextlib.suppress(OSError):  # Windows and some networks' file systems refuse
            folder = os.open(os.path.dirname(path), os.O_RDONLY)
            try:
                os.fsync(folder)  # a power cut must not forget the rename
            finally:
                os.close(folder)
        return True

    def _prune(self) -> None:
        keep = self.opt["logger"].get("keep_last")
        for state in newest_states(self.opt["path"]["training_states"])[keep or sys.maxsize :]:
            iteration = os.path.basename(state).removesuffix(".state")
            for path in (state, self._model_path(iteration)):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Continue exactly where a state was saved; a state of stock `SRModel` does as well.

        Raises:
            UserError: The state is that of another optimizer or network.
        """
        groups = self.optimizer_g.param_groups
        try:
            saved_groups = resume_state["optimizers"][0]["param_groups"]
            for saved, group in zip(saved_groups, groups, strict=False):
                own = ("params", "lr", "initial_lr")
                saved.update({key: v for key, v in group.items() if key not in own})
            super().resume_training(resume_state)
        except (AssertionError, ValueError) as error:
            raise UserError(
                f"the training state does not fit train:optim_g and network_g ({error}); resume "
                "with those that it was saved with, or begin with its weights as "
                "path:pretrain_network_g under another name"
            ) from None
        for param, state in self.optimizer_g.state.items():
            for key, value in state.items():
                if value.shape == param.shape:  # in the parameter's memory format, not its own
                    state[key] = torch.empty_like(param).copy_(value)
        for folder in ("models", "training_states"):  # what a kill in the middle of a save left
            for name in os.listdir(self.opt["path"][folder]):
                if name.endswith(".part") and self.opt["rank"] == 0:
                    os.remove(os.path.join(self.opt["path"][folder], name))
        if self.sampler:
            self.samples_seen = resume_state.get(
                "samples_seen", resume_state["iter"] * self.sampler.batch_size
            )
            self.sampler.skip = self.samples_seen
        if "rng" not in resume_state:
            return
        if resume_state["scaler"]:
            self.scaler.load_state_dict(resume_state["scaler"])
        if resume_state["best_metric_results"] is not None:
            self.best_metric_results = resume_state["best_metric_results"]
        if self.opt["rank"] == 0:
            _set_random_states(resume_state["rng"])
        now = _plain(self.started_with)
        for key, before, after in _differences(resume_state["started_with"], now):
            get_root_logger().warning(f"Resuming with another {key}: {before} -> {after}")

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """Begin a step: set its learning rate, unless the run was asked to stop."""
        stop = self.stop_signal
        # To agree is a sync; a GPU makes ten steps before anyone would notice.
        if self.opt["dist"] and (self.device.type == "cpu" or current_iter % 10 == 0):
            agreed = torch.tensor(stop, device=self.device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            stop = int(agreed)
        elif self.opt["dist"]:
            stop = 0
        if stop:
            self._stop(current_iter - 1, stop)
        super().update_learning_rate(current_iter, warmup_iter)

    @classmethod
    def ask_to_stop(cls, signum: int, frame: Any) -> None:
        """Handle a signal: finish the step, save and leave; on a second one leave at once."""
        if cls.stop_signal:
            raise KeyboardInterrupt
        cls.stop_signal = signum
        name = signal.Signals(signum).name
        get_root_logger().warning(f"{name}: finishing the step, saving, stopping")

    @classmethod
    def time_is_up(cls) -> None:
        """Finish the step, save and leave with the exit code `NOT_FINISHED`."""
        cls.stop_signal = cls.stop_signal or TIME_IS_UP

    def _stop(self, done: int, signum: int) -> None:
        if done > 0:
            self.save(self.sampler.epoch if self.sampler else 0, done)
        get_root_logger().info(f"Stopped after iter {done}; --auto_resume goes on from there.")
        raise SystemExit(NOT_FINISHED if signum == TIME_IS_UP else 128 + signum)


def _get(opt: dict[str, Any], key: str) -> Any:
    """The value of `section:key` in options, or None."""
    for name in key.split(":"):
        opt = (opt or {}).get(name)
    return opt


def _plain(value: Any) -> Any:
    """Nested options or results as plain types, which a state may hold and be loaded safely."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in NOT_COMPARED}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _differences(before: Any, after: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the key (`section:key`) and both values wherever two nested options differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            inner = f"{where}:{key}" if where else key
            yield from _differences(before.get(key), after.get(key), inner)
    elif before != after:
        yield where, before, after


def _random_states() -> dict[str, Any]:
    numpy_state = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
