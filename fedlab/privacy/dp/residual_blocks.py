"""MONAI's residual blocks without the sum in place: Opacus's hooks need the tensor that it would overwrite."""

from __future__ import annotations

import torch
from monai.networks.blocks.dynunet_block import UnetResBlock
from monai.networks.blocks.segresnet_block import ResBlock
from torch import nn

__all__ = ["REPLACED", "ResBlockKept", "UnetResBlockKept"]


class ResBlockKept(ResBlock):
    """SegResNet's block (He et al. 2016, pre-activation): x + conv(act(norm(conv(act(norm(x))))))."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.conv1(self.act(self.norm1(x)))
        out: torch.Tensor = x + self.conv2(self.act(self.norm2(inner)))
        return out


class UnetResBlockKept(UnetResBlock):
    """DynUNet's residual block: act(norm(conv(act(norm(conv(x))))) + x), x brought to the same shape if needed."""

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        inner = self.norm2(self.conv2(self.lrelu(self.norm1(self.conv1(inp)))))
        beside = inp
        if hasattr(self, "conv3"):
            beside = self.conv3(beside)
        if hasattr(self, "norm3"):
            beside = self.norm3(beside)
        out: torch.Tensor = self.lrelu(inner + beside)
        return out


#: Blocks that add in place, and their replacements with the same layers under the same names.
REPLACED: dict[type[nn.Module], type[nn.Module]] = {ResBlock: ResBlockKept, UnetResBlock: UnetResBlockKept}
