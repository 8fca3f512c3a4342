"""CARN, the cascading residual network (Ahn et al., ECCV 2018), and its mobile form CARN-M.

Names in the state dict are those of https://github.com/nmhkahn/CARN-pytorch, so that the
published checkpoints load strictly.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

MEAN_RGB = (0.4488, 0.4371, 0.4040)  # of DIV2K
SCALES = (2, 3, 4)  # of the multi-scale network


class MeanShift(nn.Module):
    """Adds a constant colour, as a frozen 1x1 convolution of 12 parameters."""

    def __init__(self, shift: tuple[float, float, float]) -> None:
        super().__init__()
        self.shifter = nn.Conv2d(3, 3, 1).requires_grad_(False)
        state = {"weight": torch.eye(3).reshape(3, 3, 1, 1), "bias": torch.tensor(shift)}
        self.shifter.load_state_dict(state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shifter(x)


class ConvReLU(nn.Module):
    """A 1x1 convolution and ReLU, where a cascade joins what it has."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(num_in, num_out, 1), nn.ReLU(inplace=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class ResidualBlock(nn.Module):
    """Residual block; CARN-M's has grouped convolutions and a pointwise one."""

    def __init__(self, num_feat: int, groups: int = 1, efficient: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_feat, num_feat, 3, padding=1, groups=groups),
            nn.ReLU(inplace=True),
            nn.Conv2d(num_feat, num_feat, 3, padding=1, groups=groups),
        )
        if efficient:
            self.body.append(nn.ReLU(inplace=True))
            self.body.append(nn.Conv2d(num_feat, num_feat, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + x)


class Cascade(nn.Module):
    """Three stages, each followed by a 1x1 convolution of everything before it.

    A single stage stands for all three.
    """

    def __init__(self, num_feat: int, stages: list[nn.Module]) -> None:
        super().__init__()
        for i, stage in enumerate(stages, 1):
            self.add_module(f"b{i}", stage)
        for i in range(1, 4):
            self.add_module(f"c{i}", ConvReLU(num_feat * (i + 1), num_feat))
        self.stages = [f"b{i if len(stages) == 3 else 1}" for i in range(1, 4)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = joined = x
        for i, stage in enumerate(self.stages, 1):
            joined = torch.cat([joined, self.get_submodule(stage)(out)], dim=1)
            out = self.get_submodule(f"c{i}")(joined)
        return out


class Upsampler(nn.Module):
    """Enlarges features by convolutions and pixel shuffle; by 4 and 8 in steps of 2."""

    def __init__(self, num_feat: int, upscale: int, groups: int) -> None:
        super().__init__()
        steps = [3] if upscale == 3 else [2] * (upscale.bit_length() - 1)
        self.body = nn.Sequential()
        for step in steps:
            self.body.append(nn.Conv2d(num_feat, num_feat * step**2, 3, padding=1, groups=groups))
            self.body.append(nn.ReLU(inplace=True))
            self.body.append(nn.PixelShuffle(step))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@ARCH_REGISTRY.register()
class CARN(Cascade):
    """Cascading residual network for super-resolution (CARN of MLRN's Table 1).

    The defaults are CARN with the upsamplers of all three scales, as it is published in one
    checkpoint: 1,591,963 parameters, the table's 1,592K, 24 of which are constants. With
    `multi_scale=False`, and so one upsampler, x2 has 964,187, x3 1,148,827 and x4 1,111,899.
    CARN-M is `groups=4, efficient=True`.

    Args:
        upscale: scale factor: 2, 3 or 4, and without `multi_scale` 8 too.
        num_feat: channels of the features, a multiple of `groups`.
        multi_scale: whether there are upsamplers for x2, x3 and x4, of which `upscale` is used.
            Training reaches that one alone, so it is made for loading published checkpoints.
        groups: groups of the upsamplers' convolutions, and with `efficient` of the blocks' too.
        efficient: whether the residual blocks are CARN-M's, one for all three in a cascade.
    """

    def __init__(
        self,
        upscale: int = 4,
        num_feat: int = 64,
        multi_scale: bool = True,
        groups: int = 1,
        efficient: bool = False,
    ) -> None:
        known = SCALES if multi_scale else (*SCALES, 8)
        if upscale not in known:
            raise ValueError(f"upscale must be one of {known}, not {upscale}.")
        if num_feat % groups:
            raise ValueError(f"num_feat must be a multiple of groups, {groups}, not {num_feat}.")

        def block() -> Cascade:
            if efficient:
                return Cascade(num_feat, [ResidualBlock(num_feat, groups, efficient=True)])
            return Cascade(num_feat, [ResidualBlock(num_feat) for _ in range(3)])

        super().__init__(num_feat, [block() for _ in range(3)])
        red, green, blue = MEAN_RGB
        self.sub_mean = MeanShift((-red, -green, -blue))
        self.add_mean = MeanShift(MEAN_RGB)
        self.entry = nn.Conv2d(3, num_feat, 3, padding=1)
        names = {f"up{scale}": scale for scale in SCALES} if multi_scale else {"up": upscale}
        self.upsample = nn.ModuleDict(
            {name: Upsampler(num_feat, scale, groups) for name, scale in names.items()}
        )
        self.used = f"up{upscale}" if multi_scale else "up"
        self.exit = nn.Conv2d(num_feat, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Enlarge `x`, (n, 3, h, w) in [0, 1]; the output is not clamped."""
        deep = super().forward(self.entry(self.sub_mean(x)))
        return self.add_mean(self.exit(self.upsample[self.used](deep)))
