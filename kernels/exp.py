"""exp and expm1 of x <= 0, the formula of csrc/math/exp.h in Triton.                                docs/math.md#exp"""

import triton
import triton.language as tl


@triton.jit
def exp_and_expm1(x):
    """exp and expm1 of a block x <= 0, float32 or float64; NaN gives NaN."""
    if x.dtype == tl.float64:
        x = tl.where(x < -709.0, -709.0, x)
        shifted = x * 1.4426950408889634 + 6755399441055744.0
        n = shifted - 6755399441055744.0
        r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10
        p = 2.5100424157005067e-08 * r + 2.7620138719733994e-07
        p = p * r + 2.7557268378684192e-06
        p = p * r + 2.480152119021773e-05
        p = p * r + 0.00019841269863105968
        p = p * r + 0.0013888888917281794
        p = p * r + 0.008333333333330051
        p = p * r + 0.04166666666662399
        p = p * r + 0.16666666666666669
        p = p * r + 0.5000000000000001
        scale = ((shifted.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        x = tl.where(x < -88.0, -88.0, x)
        shifted = x * 1.4426950216293335 + 12582912.0
        n = shifted - 12582912.0
        r = (x - n * 0.693359375) - n * -0.00021219444170128554
        p = 0.0013926213141530752 * r + 0.008363203145563602
        p = p * r + 0.041666556149721146
        p = p * r + 0.16666576266288757
        p = p * r + 0.5
        scale = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    scaled_p = scale * (r + (r * r) * p)
    return scale + scaled_p, scaled_p + (scale - 1.0)
