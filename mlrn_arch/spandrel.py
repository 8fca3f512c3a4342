"""MLRN for spandrel, which chaiNNer and others load networks with: call `install()` once."""

from __future__ import annotations

import spandrel
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel import Architecture, ImageModelDescriptor
from spandrel.util import KeyCondition

from mlrn_arch import checkpoints
from mlrn_arch.archs.esa import MIN_SIZE
from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.machine import fits_fp16


class MLRNArch(Architecture[MLRN]):
    """How spandrel recognises and builds MLRN; every argument is found by `checkpoints.deduce`."""

    def __init__(self) -> None:
        keys = "body.0.conv3.weight", "body.0.esa.conv_f.weight", "conv_after_body.weight"
        super().__init__(id="MLRN", detect=KeyCondition.has_all(*keys))

    def load(self, state_dict: spandrel.StateDict) -> ImageModelDescriptor[MLRN]:
        """Build the network of a state dict; (1, c, h, w) in [0, 1] -> the same range, clamped."""
        network_g = checkpoints.deduce(state_dict)
        model = ARCH_REGISTRY.get(network_g.pop("type"))(**network_g)
        num_feat, num_in_ch = model.conv_first.weight.shape[:2]
        num_out_ch = len(model.upsampler[0].weight) // model.upscale**2
        return ImageModelDescriptor(
            model,
            state_dict,
            architecture=self,
            purpose="Restoration" if model.upscale == 1 else "SR",
            tags=[f"{num_feat}nf", f"{len(model.body)}nb"],
            supports_half=fits_fp16(model),
            supports_bfloat16=True,
            scale=model.upscale,
            input_channels=num_in_ch,
            output_channels=num_out_ch,
            # Below, ESA continues its coarse map; spandrel's mirrored image is the better input.
            size_requirements=spandrel.SizeRequirements(minimum=MIN_SIZE),
        )


def install(registry: spandrel.ArchRegistry = spandrel.MAIN_REGISTRY) -> None:
    """Make a registry, spandrel's own unless another is given, know MLRN; twice does no harm."""
    registry.add(spandrel.ArchSupport.from_architecture(MLRNArch()), ignore_duplicates=True)
