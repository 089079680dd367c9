"""Philox4x32-10 and standard normal numbers, as atop_fast/randomness.py and ops/random_normal.py specify them.

n0, n1 = sqrt(-2 log u0) (cos, sin)(2 pi u1)                                             docs/math.md#random_normal
"""

import triton
import triton.language as tl


@triton.jit
def read_key(seed, sample_ids, draws, DRAW_STRIDE, TAG, i_sample):
    """The seed and three words of the counter, read from memory so that a CUDA graph can replay with other values."""
    b_id = tl.load(sample_ids + i_sample)
    c2 = tl.load(draws + i_sample * DRAW_STRIDE).to(tl.uint32)
    c3 = (((b_id >> 32) & 0xFFFF) | (TAG << 16)).to(tl.uint32)
    return tl.load(seed), b_id.to(tl.uint32), c2, c3


@triton.jit
def words_of_groups(o_group, b_seed, c1, c2, c3):
    """The four words of every group of elements."""
    # A 64-bit counter would select another generator.
    return tl.philox(b_seed, o_group.to(tl.uint32), c1, c2, c3)


@triton.jit
def interleave(b_0, b_1, b_2, b_3):
    """Interleave four blocks [N] into [4 N]: element 4 i + j is element i of block j."""
    pairs = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
    return pairs.reshape(4 * b_0.shape[0])


@triton.jit
def normals_of_groups(o_group, b_seed, c1, c2, c3):
    """The normal numbers of whole groups, [4 N] for groups [N]."""
    w0, w1, w2, w3 = words_of_groups(o_group, b_seed, c1, c2, c3)
    n0, n1 = _normal_pair(w0, w1)
    n2, n3 = _normal_pair(w2, w3)
    return interleave(n0, n1, n2, n3)


@triton.jit
def normals_of_elements(o_element, b_seed, c1, c2, c3):
    """The normal numbers of single elements, [N]; three quarters of the work are discarded."""
    w0, w1, w2, w3 = words_of_groups(o_element >> 2, b_seed, c1, c2, c3)
    is_second_pair = (o_element & 2) != 0
    cosine, sine = _normal_pair(tl.where(is_second_pair, w2, w0), tl.where(is_second_pair, w3, w1))
    return tl.where((o_element & 1) != 0, sine, cosine)


@triton.jit
def _normal_pair(w_radius, w_angle):
    radius = tl.sqrt_rn(_minus_2_log(w_radius))
    cosine, sine = _cos_sin(w_angle)
    return radius * cosine, radius * sine


@triton.jit
def _minus_2_log(w):
    """-2 log(u) for u = (w // 2 + 1/2) / 2**31: a polynomial in m, the mantissa in [sqrt(1/2), sqrt(2)) minus 1."""
    u = (w >> 1).to(tl.int32).to(tl.float32) + 0.5
    bits = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = (bits >> 23).to(tl.float32) - 31.0
    m = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = m * 0.20413947105407715 + -0.32170456647872925
    p = p * m + 0.3430643081665039
    p = p * m + -0.398344486951828
    p = p * m + 0.49963685870170593
    p = p * m + -0.6666892766952515
    square = m * m
    return p * m * square + square + m * -2.0 + exponent * -1.3862943649291992


@triton.jit
def _cos_sin(w):
    """cos and sin of the angle 2 pi w / 2**32: polynomials in the angle to the nearest axis."""
    x = (w << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.65729529994141e-10
    z = x * x
    s = ((z * -0.00019495634478516877 + 0.00833197869360447) * z + -0.16666650772094727) * (z * x) + x
    c = (z * -0.0013652448542416096 + 0.041661277413368225) * (z * z) + (1.0 - z * 0.5)
    quadrant = (w + 0x20000000) >> 30
    is_odd = (quadrant & 1) != 0
    cosine, sine = tl.where(is_odd, s, c), tl.where(is_odd, c, s)
    # Triton's unary minus subtracts from 0, which loses the sign of 0.
    cosine = tl.where((quadrant == 1) | (quadrant == 2), cosine * -1.0, cosine)
    return cosine, tl.where(quadrant >= 2, sine * -1.0, sine)
