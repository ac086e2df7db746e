"""CPU: placeholder over torch._int_mm until the measured path lands."""
from __future__ import annotations
from typing import TYPE_CHECKING
import torch
from torch import Tensor
from quantkit.ops import reference
from quantkit.ops.plain import Plain, PlainPacked

class CPU(Plain):
    name = "cpu"
    def why_not(self, device):
        return None if device.type == "cpu" else "needs a CPU"
    def linear(self, layer, x):
        scheme=layer.scheme
        if scheme.is_static or not scheme.symmetric or not len(x): return super().linear(layer,x)
        dtype=x.dtype
        x,side=layer.prepare_input(x)
        x=x.float()
        absmax=x.abs().amax(1,keepdim=True).clamp_min(2.**-96)
        q=(x*(127/absmax)).round_().to(torch.int8)
        acc=torch._int_mm(q,layer.weight.t())
        y=acc.float().mul_(absmax/127).mul_(layer.weight_scale.view(-1))
        if layer.bias is not None: y+=layer.bias
        if side is not None: y+=side.float()@layer.outlier_weight.float().t()
        return y.to(dtype)
