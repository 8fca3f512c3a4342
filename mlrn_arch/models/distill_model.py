"""Training with a teacher: a network that learns from another one's outputs and features."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from mlrn_arch import schema, sources
from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.archs.rlfn_arch import RLFN
from mlrn_arch.errors import UserError
from mlrn_arch.models.fast_sr_model import FastSRModel

# Weight of the blocks' errors in each stage, if the option file gives none.
STAGES = {"blocks": 1.0, "chain": 0.05, "output": 0.0}


@MODEL_REGISTRY.register()
class DistillModel(FastSRModel):
    """`FastSRModel` that learns from a teacher, `network_t` with `path:pretrain_network_t`.

    Without `network_t` the checkpoint says which network it is, of all that spandrel knows. The
    losses compare the output with the teacher's. In the stage `blocks` every block is fed its
    teacher's input, in `chain` the network runs by itself. The error of a block is log(r + 1e-4); r
    is the mean squared error over the variance of the teacher's output. Blocks correspond one to
    one, and the teacher's features are the first of the student's.
    """

    def init_training_settings(self) -> None:
        """Set up the teacher, then all else as `FastSRModel` does."""
        distill = schema.defaults("train", "distill_opt") | self.opt["train"]["distill_opt"]
        self.stage = distill["stage"]
        self.block_weight = distill.get("block_weight", STAGES[self.stage])
        self.gt_weight = distill["gt_weight"]
        net_t = load_teacher(self.opt).to(memory_format=self.memory_format)
        self.net_t = net_t.to(self.device).eval().requires_grad_(False)
        super().init_training_settings()
        self.student_blocks, self.teacher_blocks = [], []
        if self.stage != "output":
            self.student_blocks = blocks(self.get_bare_model(self.net_g))
            self.teacher_blocks = blocks(self.net_t)

    def losses(self) -> OrderedDict[str, Tensor]:
        """Run teacher and student; the losses of the stage."""
        with torch.no_grad(), self._autocast(self.precision):
            with _recorded(self.teacher_blocks) as teacher_features:
                target = self.net_t(self.lq).float()
        forced = teacher_features if self.stage == "blocks" else None
        with self._autocast(self.precision), _recorded(self.student_blocks, forced) as features:
            self.output = self.net_g(self.lq)
        output = self.output.float()
        losses: OrderedDict[str, Tensor] = OrderedDict()
        for image, share in ((target, 1 - self.gt_weight), (self.gt, self.gt_weight)):
            if share:
                for name, loss in self.compare(output, image).items():
                    losses[name] = losses.get(name, 0) + share * loss
        if self.student_blocks:
            pairs = zip(features[1:], teacher_features[1:], strict=True)
            errors = [_error(student, teacher) for student, teacher in pairs]
            losses["l_blocks"] = self.block_weight * torch.stack(errors).sum()
        return losses


def load_teacher(opt: dict[str, Any]) -> nn.Module:
    """The teacher of complete options on the CPU; `UserError` if there is none that fits."""
    path, section = opt["path"], opt.get("network_t")
    checkpoint = path["pretrain_network_t"]
    if section is None:
        return sources.load_teacher(checkpoint, opt["scale"])
    how = {"param_key": path.get("param_key_t"), "strict": path.get("strict_load_t", True)}
    return sources.load(sources.Source("network_t", section, checkpoint, **how))[0]


def _error(student: Tensor, teacher: Tensor) -> Tensor:
    """Log of the error of features relative to the teacher's variance; both (n, c, h, w)."""
    teacher = teacher.float()
    error = (student[:, : teacher.shape[1]].float() - teacher).square().mean((2, 3)).sum()
    return torch.log(error / (teacher.var((2, 3)).sum() + 1e-9) + 1e-4)


@contextlib.contextmanager
def _recorded(modules: list[nn.Module], forced: list[Tensor] | None = None) -> Iterator[list]:
    """Collect the input of the first of consecutive blocks, then the output of each.

    `forced` features replace the first channels of every block's input; the others are detached.
    """
    features: list[Tensor] = []

    def before(index: int, args: tuple[Tensor]) -> Tensor | None:
        if index == 0:
            features.append(args[0])
        if forced is None:
            return None
        replacement = forced[index].to(args[0].dtype)
        return torch.cat([replacement, args[0][:, replacement.shape[1] :].detach()], 1)

    hooks = []
    for i, module in enumerate(modules):
        hooks.append(module.register_forward_pre_hook(lambda _, args, i=i: before(i, args)))
        hooks.append(module.register_forward_hook(lambda _, args, out: features.append(out)))
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of an MLRN or RLFN, each from features to features; else `UserError`."""
    if isinstance(network, MLRN):
        return list(network.body)
    if isinstance(network, RLFN):
        return [network.get_submodule(f"block_{i}") for i in range(1, network.num_block + 1)]
    name = type(network).__name__
    raise UserError(f"{name} has no blocks like MLRN's; stage: output takes any network")


def check_blocks(student: nn.Module, teacher: nn.Module) -> None:
    """Raise `UserError` if a student's blocks cannot learn from its teacher's."""
    own, others = blocks(student), blocks(teacher)
    width, teacher_width = (
        parts[0].get_parameter("esa.conv4.weight").shape[0] for parts in (own, others)
    )
    if len(own) != len(others) or width < teacher_width:
        raise UserError(
            f"the student has {len(own)} blocks of {width} features, the teacher {len(others)} of "
            f"{teacher_width}; it needs as many blocks, and no fewer features"
        )
