"""Muon, an optimizer for the weights of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal: all directions of a weight move equally far.

    After Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). A
    convolution is the matrix of its (c_out, c_in * k * k) weights. `torch.optim.Muon` takes no
    convolutions, and turns each matrix by itself, in bf16.

    Args:
        params: Weights with at least two dimensions, better without depthwise convolutions and
            without the first and the last one of a network.
        lr: Learning rate, the root mean square of what a step adds to a weight; Adam's fit.
        momentum: Of the gradient, in Nesterov's form.
    """

    _step_supports_amp_scaling = True  # `found_inf` skips the step on the device

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Make a step; where `self.found_inf` is set, nothing changes."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            updates: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = param.grad
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                buffer = state["momentum_buffer"]
                if found_inf is not None:
                    grad = torch.where(found_inf > 0, buffer, grad)
                buffer.lerp_(grad, 1 - group["momentum"])
                update = grad.lerp(buffer, group["momentum"]).flatten(1)
                updates.setdefault(update.shape, []).append((param, update))
            for shape, pairs in updates.items():  # equal shapes at once, for a GPU's sake
                length = -group["lr"] * max(shape) ** 0.5
                if found_inf is not None:
                    length = length * (found_inf == 0)
                for (param, _), step in zip(
                    pairs, orthogonalize(torch.stack([u for _, u in pairs])), strict=True
                ):
                    param.add_(step.view(param.shape) * length)
        return loss


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of matrices, (n, rows, columns), near 1 (0.7 to 1.2).

    Five Newton-Schulz steps with Jordan's coefficients, which trade accuracy for speed.
    """
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x
