"""Muon, an optimizer for the weights of convolutions, beside Adam for all others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Adam):
    """Momentum whose step is made orthogonal: all directions of a weight move equally far.

    After Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). A
    convolution is the matrix of its (c_out, c_in * k * k) weights. `torch.optim.Muon` takes no
    convolutions and works in bf16. Adam trains `rest` and `biases` in the same optimizer, with
    `betas`, `eps` and `weight_decay`. A gradient that is not finite leaves all weights alone.

    Args:
        inner: Muon's weights, of at least two dimensions; see `inner_weights`.
        lr: Learning rate, the root mean square of what a step adds to a weight; Adam's fit.
        bias_lr: Learning rate of `biases`; `lr` by default. In the image range [0, 255] features
            are 255 times as large as in [0, 1], and biases have as far to go.
        momentum: Of Muon's gradient, in Nesterov's form.
    """

    def __init__(
        self,
        inner: Iterable[nn.Parameter],
        rest: Iterable[nn.Parameter],
        lr: float,
        biases: Iterable[nn.Parameter] = (),
        bias_lr: float | None = None,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(rest)},
            {"params": list(biases), "lr": bias_lr or lr},
            {"params": list(inner), "momentum": momentum},
        ]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, lr, betas, eps, weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make a step; where `self.found_inf` is set, nothing changes."""
        groups = self.param_groups
        for group in groups:
            if "momentum" in group:
                self._step_muon(group)
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            return super().step()
        finally:
            self.param_groups = groups

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # Adam's looks for its own moments

    def _step_muon(self, group: dict[str, Any]) -> None:
        found_inf = getattr(self, "found_inf", None)
        updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for param in group["params"]:
            if (grad := param.grad) is None:
                continue
            state = self.state[param]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(param)
            buffer = state["momentum_buffer"]
            if found_inf is not None:
                grad = torch.where(found_inf > 0, buffer, grad)
            buffer.lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(buffer, group["momentum"]).flatten(1)
            updates.setdefault(update.shape, []).append((param, update))
        for shape, pairs in updates.items():  # equal shapes at once: fewer kernels on a GPU
            length = -group["lr"] * max(shape) ** 0.5
            if found_inf is not None:
                length = length * (found_inf == 0)
            steps = orthogonalize(torch.stack([update for _, update in pairs]))
            for (param, _), step in zip(pairs, steps, strict=True):
                param.add_(step.view(param.shape) * length)


def inner_weights(network: nn.Module, image: Tensor) -> list[nn.Parameter]:
    """The weights that Muon is made for: of convolutions and linear layers inside a network.

    Without the first and the last layer that run on `image`, (1, c, h, w), those that read or
    write images in between, and depthwise, grouped or transposed convolutions.
    """
    ran: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
        for module in network.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d))
        and module.weight.requires_grad
    ]
    training = network.training
    try:
        with torch.no_grad():
            network.eval().forward(image)  # not through __call__, which may be compiled
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    inside = [module for module in dict.fromkeys(ran) if module not in (ran[0], ran[-1])]
    return [
        module.weight
        for module in inside
        if isinstance(module, (nn.Conv2d, nn.Linear))
        and isinstance(module.weight, nn.Parameter)
        and getattr(module, "groups", 1) == 1
        and min(module.weight.shape[:2]) > image.shape[1]
    ]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring all singular values of matrices, (n, rows, columns), near 1 (0.7 to 1.2)."""
    # Five Newton-Schulz steps with Jordan's coefficients, which trade accuracy for speed.
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x
