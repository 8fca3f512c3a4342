"""A faster `SRModel`."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import OrderedDict
from typing import Any

import torch
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY

from mlrn_arch import networks, schema
from mlrn_arch.errors import UserError
from mlrn_arch.inherit import inherit_weights
from mlrn_arch.machine import DTYPES, exact_fp32
from mlrn_arch.models.muon import Muon, inner_weights
from mlrn_arch.models.resumable_model import ResumableModel


@MODEL_REGISTRY.register()
class FastSRModel(ResumableModel):
    """`SRModel` in reduced precision, without a GPU sync a step, with saves that stay whole.

    Takes every option of `SRModel`, and those that options/README.md lists. A loss that is not
    finite raises `UserError`.
    """

    stateful = ("scaler",)  # the loss scaling of fp16

    def __init__(self, opt: dict[str, Any]) -> None:
        train = schema.defaults("train") | (opt.get("train") or {})
        val = schema.defaults("val") | (opt.get("val") or {})
        self.precision, self.val_precision = train["precision"], val["precision"]
        self.compiled = train["compile"]
        if self.precision == "fp32":
            torch.backends.cudnn.allow_tf32 = False
        formats = {True: torch.channels_last, False: torch.contiguous_format}
        self.memory_format = formats[train["channels_last"]]
        self.pending: list[tuple[int, torch.Tensor, list[str]]] = []
        self.loss_dict: dict[str, torch.Tensor] = {}
        self.samples, self.samples_since = 0, time.monotonic()
        super().__init__(opt)

    def model_to_device(self, net: torch.nn.Module) -> torch.nn.Module:
        """Move a network to the device, channels last, compiled and wrapped as the options say."""
        net = net.to(memory_format=self.memory_format)
        if self.compiled:
            net.compile()  # in place, so that the names in its state dict stay
        return super().model_to_device(net)

    def init_training_settings(self) -> None:
        """Set up EMA, losses, optimizer and schedule as `SRModel` does, and loss scaling."""
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        source = self.opt["train"].get("inherit_network_g")
        # A run that is resumed has its own weights in pretrain_network_g.
        if source and not self.opt["path"].get("pretrain_network_g"):
            inherit_weights(self.get_bare_model(self.net_g), source)
        super().init_training_settings()
        self.params = [p for group in self.optimizer_g.param_groups for p in group["params"]]
        if self.ema_decay > 0:
            self.net_g_ema.to(memory_format=self.memory_format)

    def get_optimizer(
        self, optim_type: str, params: list[torch.nn.Parameter], lr: float, **kwargs: Any
    ) -> torch.optim.Optimizer:
        """Build BasicSR's Adam, as one fused kernel, or `Muon`."""
        if optim_type != "Muon":
            return super().get_optimizer(optim_type, params, lr, fused=True, **kwargs)
        net = self.get_bare_model(self.net_g)
        channels = networks.input_channels(net, self.opt["network_g"]) or 3
        inner = inner_weights(net, torch.zeros(1, channels, 64, 64, device=self.device))
        ids = {id(param) for param in inner}
        biases = {id(p) for n, p in net.named_parameters() if n.endswith("bias")}
        kwargs["biases"] = [param for param in params if id(param) in biases]
        rest = [param for param in params if id(param) not in ids | biases]
        get_root_logger().info(f"Muon trains {sum(p.numel() for p in inner):,} parameters")
        return Muon(inner, rest, lr, **kwargs)

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch: `lq` (n, c, h, w) and `gt`, float in [0, 1] or uint8."""
        self.lq_path = data["lq_path"]
        for key in {"lq", "gt"} & data.keys():
            if data[key].is_cuda:  # the prefetcher's stream must not reuse it before it is read
                data[key].record_stream(torch.cuda.current_stream())
            image = data[key].to(self.device, non_blocking=True, memory_format=self.memory_format)
            setattr(self, key, image if image.is_floating_point() else image.float() / 255)

    def _autocast(self, precision: str) -> contextlib.AbstractContextManager:
        dtype = DTYPES[precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def losses(self) -> OrderedDict[str, torch.Tensor]:
        """Run the network on `lq`, and compare its output with `gt`."""
        with self._autocast(self.precision):
            self.output = self.net_g(self.lq)
        return self.compare(self.output.float(), self.gt)

    def compare(self, output: torch.Tensor, target: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """The losses of the option file, by name; both images are (n, c, h, w), fp32."""
        losses = OrderedDict()
        if self.cri_pix:
            losses["l_pix"] = self.cri_pix(output, target)
        if self.cri_perceptual:
            l_percep, l_style = self.cri_perceptual(output, target)
            losses.update({"l_percep": l_percep, "l_style": l_style})
        return OrderedDict((name, loss) for name, loss in losses.items() if loss is not None)

    def optimize_parameters(self, current_iter: int) -> None:
        """Train on the batch fed last. A gradient that is not finite leaves the weights alone."""
        self.optimizer_g.zero_grad()
        self.loss_dict = self.losses()
        l_total = torch.stack(list(self.loss_dict.values())).sum()
        self.scaler.scale(l_total).backward()
        self.scaler.unscale_(self.optimizer_g)
        # A network may have parts that are of no use at this scale.
        used = [param for param in self.params if param.grad is not None]
        norm = torch.nn.utils.get_total_norm([param.grad for param in used])
        if max_norm := self.opt["train"].get("grad_clip"):
            torch.nn.utils.clip_grads_with_norm_(used, max_norm, norm)
        bad = ~torch.isfinite(l_total.detach())
        if not self.scaler.is_enabled():  # while scaling, an infinite gradient is nothing unusual
            bad |= ~torch.isfinite(norm)
            self.optimizer_g.found_inf = bad.float()  # skips the step on the device
        self.scaler.step(self.optimizer_g)
        self.scaler.update()
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

        self.pending.append((current_iter, bad, self.lq_path))
        self.samples += self.opt["world_size"] * len(self.lq)
        self.samples_seen += self.opt["world_size"] * len(self.lq)
        if self.device.type == "cpu":  # looking costs nothing here; on a GPU it is a sync
            self._check_finite()

    @functools.cached_property
    def ema_pair(self) -> list[list[torch.Tensor]]:
        """The parameters of the EMA network and of the network; each step needs them."""
        return [list(n.parameters()) for n in (self.net_g_ema, self.get_bare_model(self.net_g))]

    @torch.no_grad()
    def model_ema(self, decay: float = 0.999) -> None:
        """Move the EMA weights towards the weights, all of them in two kernels."""
        averages, weights = self.ema_pair
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, weights, alpha=1 - decay)

    def _check_finite(self) -> None:
        """Look at what the last steps found; raise for the first loss that was not finite."""
        if not self.pending:
            return
        bad = torch.stack([flag for _, flag, _ in self.pending]).float()
        if self.opt["dist"]:
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        found = bad.tolist()
        pending, self.pending = self.pending, []
        if any(found):
            current_iter, _, paths = pending[found.index(1)]
            raise UserError(
                f"the loss or its gradient was not finite at iter {current_iter}; the weights stay "
                f"as they were. The batch: {', '.join(paths)}. Look at these images, lower "
                "train:optim_g:lr, set train:grad_clip or train:precision=fp32; then --auto_resume"
            )

    def get_current_log(self) -> dict[str, float]:
        """Fetch the losses of the last step (the mean over all processes) and samples a second."""
        self._check_finite()
        values = torch.stack([loss.detach() for loss in self.loss_dict.values()])
        if self.opt["dist"]:
            torch.distributed.all_reduce(values)
            values /= self.opt["world_size"]
        log = dict(zip(self.loss_dict, values.tolist(), strict=True))
        now = time.monotonic()
        log["samples/s"] = self.samples / (now - self.samples_since)
        self.samples, self.samples_since = 0, now
        return log

    def test(self) -> None:
        """Run the network (its EMA weights if there are any) on `lq`, in val:precision."""
        self.stop_if_asked()
        net = self.net_g_ema if hasattr(self, "net_g_ema") else self.get_bare_model(self.net_g)
        training = net.training
        net.eval()
        try:
            with torch.inference_mode(), exact_fp32(), self._autocast(self.val_precision):
                # Not through __call__: a compiled network would be compiled for every image size.
                self.output = net.forward(self.lq).float()
        finally:
            net.train(training)
            self.samples, self.samples_since = 0, time.monotonic()  # of training alone

    def save(self, epoch: int, current_iter: int) -> None:
        """Save as `ResumableModel` does, unless a loss was not finite."""
        self._check_finite()
        super().save(epoch, current_iter)
