"""Normalisation layers whose gradient is fast on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from diptych.core.tensors import Tensor


class _RMSNorm(torch.autograd.Function):
    """``F.rms_norm`` for training on a CPU, where torch's gradient is a dozen passes over memory. Layer norm's backward
    kernel is one pass: with a mean of zero it gives this gradient less the mean of ``gradient * weight``, which is
    added again."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y = x.float()
        scale = y.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(y, weight, scale)
        ctx.dtype = x.dtype
        return (y * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, weight, scale = ctx.saved_tensors
        grad, gain = grad.to(y.dtype).contiguous(), weight.to(y.dtype)
        zero = torch.zeros_like(scale)
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, y, gain.shape, zero, scale, gain, None, [True, True, False]
        )
        dx.addcmul_((grad @ gain / len(gain))[..., None], scale)
        return dx.to(ctx.dtype), dweight.to(weight.dtype), None


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * gain, computed in float32 (arXiv 1910.07467, Eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape and dtype."""
        if torch.is_grad_enabled() and x.device.type in ("cpu", "meta"):
            return _RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
