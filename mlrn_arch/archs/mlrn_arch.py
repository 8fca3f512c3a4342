"""MLRN, the mixer-based local residual network (Gendy et al., CVPR Workshops 2023)."""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn
from torch.nn import functional as F

from .checks import check_img_range, check_sizes
from .esa import ESA


def _activation(act: str) -> nn.Module:
    # GELU is the exact (erf) one. LeakyReLU may work in place: it only ever sees the fresh
    # output of a convolution.
    return nn.GELU() if act == "gelu" else nn.LeakyReLU(0.05, inplace=True)


class ConvMix(nn.Module):
    """Convolution mixer: mixes space, then channels (eq. 3 and 4).

    Args:
        num_feat: channels, at least 1.
        act: `"gelu"` or `"lrelu"`.
        depthwise: False leaves eq. 3 out, `F_DWC = F_conv3_2` (Table 2, "W/O depthwise conv").
    """

    def __init__(self, num_feat: int, act: str = "gelu", depthwise: bool = True) -> None:
        super().__init__()
        self.depthwise = (
            nn.Conv2d(num_feat, num_feat, 3, padding=1, groups=num_feat) if depthwise else None
        )
        self.pointwise = nn.Conv2d(num_feat, num_feat, 1)
        self.act = _activation(act)

    def forward(self, f_conv3_2: torch.Tensor) -> torch.Tensor:
        """Mix `f_conv3_2`, (n, num_feat, h, w), into `F_CM` of the same shape."""
        f_dwc = f_conv3_2
        if self.depthwise is not None:
            f_dwc = self.act(self.depthwise(f_conv3_2)) + f_conv3_2  # eq. 3
        f_cm = self.act(self.pointwise(f_dwc))  # eq. 4
        return f_cm


class MLRB(nn.Module):
    """Mixer-based local residual block (eq. 1 to 5, figure 2).

    Args:
        num_feat: channels of input and output, at least 1.
        esa_feat: channels inside the attention, at least 1.
        mixer: `"convmix"`, `"pointwise"` (no depthwise convolution) or `"none"`.
        act: `"gelu"` or `"lrelu"`.
    """

    def __init__(
        self, num_feat: int, esa_feat: int = 16, mixer: str = "convmix", act: str = "gelu"
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.conv2 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.mixer = (
            nn.Identity()
            if mixer == "none"
            else ConvMix(num_feat, act, depthwise=mixer == "convmix")
        )
        self.conv3 = nn.Conv2d(num_feat, num_feat, 1)
        self.esa = ESA(num_feat, esa_feat)
        self.act = _activation(act)

    def forward(self, f_in: torch.Tensor) -> torch.Tensor:
        """Map `F_in`, (n, num_feat, h, w), to `F_out` of the same shape."""
        f_conv3_1 = self.act(self.conv1(f_in))  # eq. 1
        f_conv3_2 = self.act(self.conv2(f_conv3_1))  # eq. 2
        f_cm = self.mixer(f_conv3_2)  # eq. 3 and 4
        f_out = self.esa(self.conv3(f_cm + f_in))  # eq. 5; conv3 is the paper's H_conv1, 1x1
        return f_out


@ARCH_REGISTRY.register()
class MLRN(nn.Module):
    """Mixer-based local residual network for super-resolution (eq. 6 to 10, figure 1).

    The defaults are the paper's x4 network (Table 1, 506,666 parameters). The network of the
    NTIRE 2023 challenge (section 4.6) is `num_feat=50, num_block=4, img_range=255`.

    Args:
        num_in_ch: channels of the input image.
        num_out_ch: channels of the output image.
        num_feat: channels of the features.
        num_block: number of MLRBs, `m` of eq. 7.
        upscale: scale factor; 2, 3 and 4 in the paper.
        esa_feat: channels inside the attention.
        img_range: the network computes on `x * img_range` and its output is divided by it, so
            that callers pass and get [0, 1] whatever it is.
        mixer: `"convmix"`; `"pointwise"` leaves out the depthwise convolution with its
            activation and residual (eq. 3), `"none"` the pointwise convolution with its
            activation too (eq. 4), so `F_CM = F_conv3_2` (Table 2).
        act: `"gelu"`, or `"lrelu"` for LeakyReLU of slope 0.05 in place of every GELU of the
            model, those of ConvMix included (Table 2).
        bilinear: whether the bilinearly upsampled input is added to the output (eq. 10, Table 2).

    Raises:
        ValueError: if a size is not a positive integer, `img_range` is not a positive number,
            `mixer` or `act` is unknown, or `bilinear` is asked for with unequal `num_in_ch` and
            `num_out_ch`.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 58,
        num_block: int = 6,
        upscale: int = 4,
        esa_feat: int = 16,
        img_range: float = 1.0,
        mixer: str = "convmix",
        act: str = "gelu",
        bilinear: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(
            num_in_ch=num_in_ch,
            num_out_ch=num_out_ch,
            num_feat=num_feat,
            num_block=num_block,
            upscale=upscale,
            esa_feat=esa_feat,
        )
        check_img_range(img_range)
        if mixer not in ("convmix", "pointwise", "none"):
            raise ValueError(f"mixer must be convmix, pointwise or none, not {mixer!r}.")
        if act not in ("gelu", "lrelu"):
            raise ValueError(f"act must be gelu or lrelu, not {act!r}.")
        if bilinear and num_in_ch != num_out_ch:
            raise ValueError(
                "bilinear adds the input to the output, so num_in_ch and num_out_ch must be "
                f"equal, not {num_in_ch} and {num_out_ch}."
            )
        self.upscale = upscale
        self.img_range = float(img_range)
        self.bilinear = bilinear
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.body = nn.Sequential(*(MLRB(num_feat, esa_feat, mixer, act) for _ in range(num_block)))
        self.conv_after_body = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Super-resolve a batch of images of any size.

        Args:
            x: low-resolution images in [0, 1], (n, num_in_ch, h, w).

        Returns:
            High-resolution images, nominally in [0, 1] (not clamped),
            (n, num_out_ch, h * upscale, w * upscale).
        """
        f_0 = _exactly(self.conv_first, x * self.img_range)  # eq. 6
        f_m = self.body(f_0)  # eq. 7
        f_df = _exactly(self.conv_after_body, f_m)  # eq. 8
        f_sr = _exactly(self.upsampler, f_df + f_0) / self.img_range  # eq. 9
        if not self.bilinear:
            return f_sr
        # H_BU is linear, so the image range cancels in it and x itself is upsampled: no rounding
        # on the way to img_range and back.
        h_bu = F.interpolate(x, scale_factor=self.upscale, mode="bilinear", align_corners=False)
        y = h_bu + f_sr  # eq. 10
        return y


def _exactly(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`, without autocast.

    The first and the last features carry the image itself to the upsampler. Rounded to the 8 bits
    of bf16, it would be off by up to half a grey level; what a block adds is small, and may be.
    """
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return layer(x)
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(next(layer.parameters()).dtype))
