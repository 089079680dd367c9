"""Sample-keyed standard normal numbers                                                    docs/math.md#random_normal"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atop_fast.ops.random_normal import reference

from ._launch import EXACT, MAX_ROW, launch, stride_of
from .philox import normals_of_elements, normals_of_groups, read_key


@triton.jit(do_not_specialize=["DRAW_STRIDE", "TAG"])
def random_normal_kernel(
    seed,  # []
    sample_ids,  # [B]
    draws,  # [B] or []
    y,  # [B, COUNT]
    DRAW_STRIDE,
    TAG,
    COUNT,
    IS_WHOLE: tl.constexpr,  # COUNT is divisible by 4
    BLOCK: tl.constexpr,
):
    if IS_WHOLE:
        # Tells the compiler that rows begin at a multiple of 16 bytes.
        COUNT = COUNT // 4 * 4
    i_block, n_blocks = tl.program_id(0), tl.cdiv(COUNT, BLOCK)
    i_sample, i_first = (i_block // n_blocks).to(tl.int64), i_block % n_blocks * BLOCK
    b_seed, c1, c2, c3 = read_key(seed, sample_ids, draws, DRAW_STRIDE, TAG, i_sample)
    o_y = i_first + tl.arange(0, BLOCK)
    if IS_WHOLE:
        b_y = normals_of_groups(i_first // 4 + tl.arange(0, BLOCK // 4), b_seed, c1, c2, c3)
    else:
        b_y = normals_of_elements(o_y, b_seed, c1, c2, c3)
    tl.store(y + i_sample * COUNT + o_y, b_y, o_y < COUNT)


def launch_random_normal(seed: Tensor, sample_ids: Tensor, draws: Tensor, tag: int, count: int) -> Tensor:
    """The Triton implementation of atop_fast::random_normal."""
    if count > MAX_ROW:
        return reference(seed, sample_ids, draws, tag, count)
    device, batch = sample_ids.device, len(sample_ids)
    y = torch.empty((batch, count), dtype=torch.float32, device=device)
    if y.numel():
        key = (seed, sample_ids.contiguous(), draws)
        numbers = (stride_of(draws), tag, count, count % 4 == 0)
        launch(random_normal_kernel, count, device, *key, y, *numbers, rows=batch, **EXACT)
    return y
