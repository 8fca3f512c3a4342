"""A `SRModel` whose run cannot be lost: whole files, exact resumes, stops that save."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger

from mlrn_arch import checkpoints
from mlrn_arch.compat import newest_states
from mlrn_arch.data import ResumableSampler, seed_everything
from mlrn_arch.errors import UserError
from mlrn_arch.files import atomic_write
from mlrn_arch.models.validation import is_better, validate

# Options that decide the course of a run, but for those that may differ between machines. A
# resume logs which of them changed.
COMPARED = ("scale", "manual_seed", "world_size", "network_g", "network_t", "train")
NOT_COMPARED = ("num_worker_per_gpu", "prefetch_mode", "pin_memory", "dataroot_gt", "dataroot_lq")
NOT_FINISHED = 75  # sysexits.h's "try again later", the exit code of --time_limit
TIME_IS_UP = 14  # in place of a signal's number; SIGALRM's, where a system has it
SAME_SIGNAL = 3.0  # seconds; torchrun repeats the Ctrl-C that the terminal sent to all processes


class ResumableModel(SRModel):
    """The saving, validating, resuming and stopping of `FastSRModel`, which trains with it."""

    stateful: tuple[str, ...] = ()  # a subclass's attributes whose `state_dict` is saved, too
    stop_signal, signalled_at = 0, -math.inf  # of the process, so of the class
    # `mlrn train` sets these:
    sampler: ResumableSampler | None = None
    val_loaders: list[Any] = []
    tb_logger: Any = None

    failed = False  # a validation, or the last save
    done = samples_seen = 0  # steps, and samples of all processes
    saved = 0, 0  # epoch and iteration of the newest state
    resumed = False  # until the first step

    def __init__(self, opt: dict[str, Any]) -> None:
        compared = {key: opt[key] for key in COMPARED if opt.get(key) is not None}
        data = opt["datasets"].get("train", {}).items()
        compared["datasets:train"] = {k: v for k, v in data if k not in NOT_COMPARED}
        self.started_with = copy.deepcopy(compared)
        self.validated: dict[str, int] = {}  # name of a set -> iteration of its last validation
        super().__init__(opt)

    # Saving

    def save(self, epoch: int, current_iter: int) -> None:
        """Write networks and training state, whole or not at all; -1 is `net_g_latest.pth`."""
        if self.opt["rank"] != 0:
            return
        if current_iter == -1:
            if self.saved[1] != self.done:  # a longer run can go on from the last step
                self.save(self.sampler.epoch if self.sampler else 0, self.done)
            self.failed |= not self._write(self._networks(), self._path("net_g_latest.pth"))
        # The network first: a state without its network could not be resumed.
        elif self._write(self._networks(), self._path(f"net_g_{current_iter}.pth")) and self._write(
            self.training_state(epoch, current_iter), self._path(f"{current_iter}.state")
        ):
            self.saved = epoch, current_iter
            self._prune()

    def training_state(self, epoch: int, current_iter: int) -> dict[str, Any]:
        """All that a resume needs beside the networks, in types that load without running code."""
        return {
            "epoch": epoch,
            "iter": current_iter,
            "optimizers": [self.optimizer_g.state_dict()],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            **{name: getattr(self, name).state_dict() for name in self.stateful},
            "samples_seen": self.samples_seen,
            "best_metric_results": getattr(self, "best_metric_results", {}),
            "validated": self.validated,
            "started_with": self.started_with,
        }

    def _networks(self) -> dict[str, Any]:
        networks = {"params": self.get_bare_model(self.net_g)}
        if hasattr(self, "net_g_ema"):
            networks["params_ema"] = self.net_g_ema
        states = {
            key: {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
            for key, net in networks.items()
        }
        return {k: checkpoints.note(state, self.opt["network_g"]) for k, state in states.items()}

    def _path(self, name: str) -> str:
        folder = "models" if name.endswith(".pth") else "training_states"
        return os.path.join(self.opt["path"][folder], name)

    @staticmethod
    def _write(content: dict[str, Any], path: str) -> bool:
        """Write a file, whole or not at all; False if the disk refused."""
        try:
            with atomic_write(path) as part:
                checkpoints.save(content, part)
        except OSError as error:
            get_root_logger().error(f"Could not save {path}: {error.strerror}; training goes on")
            return False
        return True

    def _prune(self) -> None:
        keep = self.opt["logger"].get("keep_last")
        states = newest_states(self.opt["path"]["training_states"])
        # Newer ones are of a run that was given up for an older state.
        states = [state for state in states if int(Path(state).stem) <= self.saved[1]]
        for state in states[keep or sys.maxsize :]:
            for path in (state, self._path(f"net_g_{Path(state).stem}.pth")):
                Path(path).unlink(missing_ok=True)

    # Validating

    nondist_validation = validate
    dist_validation = functools.partialmethod(validate, shared=True)

    def validation(
        self, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool = False
    ) -> None:
        """Validate; in training keep the best network by `val:save_best`, and survive a failure."""
        if not self.is_train:
            super().validation(dataloader, current_iter, tb_logger, save_img)
            return
        name = dataloader.dataset.opt["name"]
        if self.validated.get(name) == self.done:  # BasicSR validates again at the end of a run
            return
        try:  # current_iter is one too many at the end
            super().validation(dataloader, self.done, tb_logger, save_img)
        except Exception as error:
            self.failed = True
            reason = str(error).rpartition("UserError: ")[2]  # out of a worker with a traceback
            get_root_logger().error(f"Validation of {name} failed: {reason}; training goes on")
            return
        self.validated[name] = self.done
        if self.opt["rank"] == 0:
            self._save_best(name)
            if self.saved[1] == self.done:  # the file does not have these scores yet
                self._write(self.training_state(*self.saved), self._path(f"{self.done}.state"))

    def _save_best(self, name: str) -> None:
        """Write `net_g_best.pth` if the first validation set has its best score so far.

        The file contains its score: no kill and no resume replaces it by a worse network.
        """
        metric, sets = self.opt["val"].get("save_best"), self.opt["datasets"].values()
        first = next(opt["name"] for opt in sets if opt["phase"] == "val")
        if name != first or metric not in self.metric_results:
            return
        better = self.best_metric_results[name][metric]["better"]
        kind = {"dataset": name, "metric": metric, "better": better}
        path, value, saved = self._path("net_g_best.pth"), self.metric_results[metric], None
        with contextlib.suppress(UserError):  # there is none yet
            saved = checkpoints.read(path).get("best")
        if saved and kind.items() <= saved.items() and not is_better(value, saved["val"], better):
            get_root_logger().info(f"{path} is still that of iter {saved['iter']}")
            return
        self._write({**self._networks(), "best": {**kind, "val": value, "iter": self.done}}, path)

    # Resuming

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Continue exactly where a state was saved, also by stock `SRModel`.

        The settings of the optimizer and the schedule are those of the option file now.
        """
        self.done = done = resume_state["iter"]
        self._load_optimizer(resume_state["optimizers"][0])
        self._set_schedule(min(done, self.opt["train"]["total_iter"]))
        for folder in ("models", "training_states"):  # what a kill in the middle of a save left
            for part in Path(self.opt["path"][folder]).glob(".*.part.*"):
                if self.opt["rank"] == 0:
                    part.unlink()
        if self.sampler:
            self.samples_seen = resume_state.get("samples_seen", done * self.sampler.batch_size)
            self.sampler.skip = self.samples_seen
        self.best_metric_results = resume_state.get("best_metric_results") or {}
        for name in self.stateful:
            if state := resume_state.get(name):
                getattr(self, name).load_state_dict(state)
        if "validated" in resume_state:
            self.validated, self.resumed = resume_state["validated"], True
        file = os.path.abspath(self.opt["path"].get("resume_state") or "")
        if file == self._path(f"{done}.state"):
            self.saved = resume_state["epoch"], done
        now = _flat(self.started_with)
        before = _flat(resume_state.get("started_with", now))
        for key in [key for key in before | now if before.get(key) != now.get(key)]:
            change = f"{before.get(key)} -> {now.get(key)}"
            get_root_logger().warning(f"Resuming with another {key}: {change}")

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        """Load the optimizer's moments; its settings stay those of the option file."""
        groups = zip(saved["param_groups"], self.optimizer_g.param_groups, strict=False)
        settings = [{**group, "params": saved_group["params"]} for saved_group, group in groups]
        try:
            self.optimizer_g.load_state_dict({**saved, "param_groups": settings})
            for param, state in self.optimizer_g.state.items():
                if self.opt["train"]["optim_g"].get("amsgrad"):  # which may be new
                    state.setdefault("max_exp_avg_sq", torch.zeros_like(param))
                for key, value in state.items():
                    if key != "step":  # in the parameter's memory format, not in its own
                        state[key] = torch.empty_like(param).copy_(value.reshape(param.shape))
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the training state does not fit train:optim_g and network_g ({error}); restore "
                "these options, or start another run by path:pretrain_network_g"
            ) from None

    def _set_schedule(self, done: int) -> None:
        """Set the learning rates to those that `done` steps by the option file lead to."""
        warmup_iter = self.opt["train"].get("warmup_iter", -1)
        if warm := max(0, min(done, warmup_iter - 1)):
            rates = self._get_init_lr()
            self._set_lr([[rate / warmup_iter * warm for rate in group] for group in rates])
        for scheduler in self.schedulers:
            changes = {*getattr(scheduler, "milestones", ()), *getattr(scheduler, "restarts", ())}
            first, last = max(warm, 1), done - 1  # at step i a schedule's count is i - 1
            for epoch in sorted({e for e in changes if first <= e < last} | {last}):
                scheduler.last_epoch = epoch
                if epoch >= first:
                    self._set_lr([scheduler.get_lr()])

    # Steps and stops

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """Begin a step: set its learning rate and seed, unless the run was asked to stop."""
        stop, val = self.stop_signal, self.opt.get("val")
        # To agree is a sync; a GPU makes ten steps before anyone would notice.
        if self.opt["dist"] and (self.device.type == "cpu" or current_iter % 10 == 0):
            agreed = torch.tensor(stop, device=self.device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            stop = int(agreed)
        elif self.opt["dist"]:
            stop = 0
        if stop:
            self._stop(current_iter - 1, stop)
        if self.resumed and val and (current_iter - 1) % val["val_freq"] == 0:
            for loader in self.val_loaders:  # skips those that the stopped run finished
                self.validation(loader, current_iter - 1, self.tb_logger, val["save_img"])
        self.resumed, self.done = False, current_iter
        super().update_learning_rate(current_iter, warmup_iter)
        # Seeded by step, random numbers need no place in the training state.
        seed_everything(f"{self.opt['manual_seed']}:{self.opt['rank']}:{current_iter}")

    @classmethod
    def ask_to_stop(cls, signum: int, frame: Any) -> None:
        """Handle a signal: finish the step, save and leave; on a second one leave at once."""
        since = time.monotonic() - cls.signalled_at
        if since == math.inf:
            cls.stop_signal, cls.signalled_at = cls.stop_signal or signum, time.monotonic()
            name = signal.Signals(signum).name
            get_root_logger().warning(f"{name}: finishing the step, saving, stopping")
        elif since > SAME_SIGNAL:
            raise KeyboardInterrupt

    @classmethod
    def time_is_up(cls) -> None:
        """Finish the step, save and leave with the exit code `NOT_FINISHED`."""
        cls.stop_signal = cls.stop_signal or TIME_IS_UP

    def stop_if_asked(self) -> None:
        """Save and leave in the middle of a validation; the resume repeats it."""
        if self.is_train and self.stop_signal and not self.opt["dist"]:
            self._stop(self.done, self.stop_signal)

    def _stop(self, done: int, signum: int) -> None:
        if done > 0:
            self.save(self.sampler.epoch if self.sampler else 0, done)
        if self.opt["dist"]:  # torchrun ends all processes when the first one leaves
            torch.distributed.barrier()
        get_root_logger().info(f"Stopped; --auto_resume goes on after iter {self.saved[1]}.")
        raise SystemExit(NOT_FINISHED if signum == TIME_IS_UP else 128 + signum)


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    """Nested options by their whole keys, such as `train:optim_g:lr`."""
    if not isinstance(value, dict):
        return {where: value}
    sections = [_flat(inner, f"{where}:{key}" if where else key) for key, inner in value.items()]
    return {key: item for section in sections for key, item in section.items()}
