"""log(1 + u) for u >= 0, the formula of csrc/math/log1p.h in Triton.                             docs/math.md#log1p"""

import triton
import triton.language as tl


@triton.jit
def _divide(a, b):
    # Plain float32 division has an error of up to 2 ulp; float64 division is correctly rounded.
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def log1p(u):
    """log(1 + u) of a block u >= 0, float32 or float64; NaN gives NaN."""
    w = 1.0 + u
    if u.dtype == tl.float64:
        bits = w.to(tl.int64, bitcast=True) - 0x3FE6A09E667F3BCD
        n = (bits >> 52).to(tl.float64)
        f = ((bits & 0x000FFFFFFFFFFFFF) + 0x3FE6A09E667F3BCD).to(tl.float64, bitcast=True) - 1.0
    else:
        bits = w.to(tl.int32, bitcast=True) - 0x3F3504F3
        n = (bits >> 23).to(tl.float32)
        f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    s = _divide(f, 2.0 + f)
    z = s * s
    if u.dtype == tl.float64:
        p = z * 0.047619047619047616 + 0.05263157894736842
        p = z * p + 0.058823529411764705
        p = z * p + 0.06666666666666667
        p = z * p + 0.07692307692307693
        p = z * p + 0.09090909090909091
        p = z * p + 0.1111111111111111
    else:
        p = z * 0.0 + 0.1111111111111111
    p = z * p + 0.14285714285714285
    p = z * p + 0.2
    p = z * p + 0.3333333333333333
    lost = _divide(u - (w - 1.0), w)
    return n * 0.6931471805599453 + ((s + s) * (1.0 + z * p) + lost)
