"""Activation functions, as device functions on float32 tiles."""

import triton
import triton.language as tl

from .settled import settle

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x). Saturates to 0 and 1 without overflow warnings: e^-x becomes inf, and 1/inf is 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Hyperbolic tangent with a relative error of about one rounding over the whole range.

    Near zero the exponential form cancels, so |x| < 0.625 takes the odd minimax polynomial of Cephes' ``tanhf``;
    beyond it 1 - 2 / (e^2|x| + 1) saturates rightly. ``libdevice.tanh`` would do, but has no interpreted form.
    """
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    near_zero = p * z * x + x
    magnitude = tl.abs(x)
    saturating = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.625, near_zero, tl.where(x < 0, -saturating, saturating))


settle(globals())
