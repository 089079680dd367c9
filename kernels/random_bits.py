"""Random words that belong to samples                                                     docs/math.md#random_normal"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atop_fast.ops.random_bits import reference

from ._launch import MAX_ROW, launch, stride_of
from .philox import interleave, read_key, words_of_groups


@triton.jit(do_not_specialize=["DRAW_STRIDE", "TAG"])
def random_bits_kernel(
    seed,  # []
    sample_ids,  # [B]
    draws,  # [B] or []
    y,  # [B, COUNT]
    DRAW_STRIDE,
    TAG,
    COUNT,
    BLOCK: tl.constexpr,
):
    i_block, n_blocks = tl.program_id(0), tl.cdiv(COUNT, BLOCK)
    i_sample, i_first = (i_block // n_blocks).to(tl.int64), i_block % n_blocks * BLOCK
    b_seed, c1, c2, c3 = read_key(seed, sample_ids, draws, DRAW_STRIDE, TAG, i_sample)
    w0, w1, w2, w3 = words_of_groups(i_first // 4 + tl.arange(0, BLOCK // 4), b_seed, c1, c2, c3)
    o_y = i_first + tl.arange(0, BLOCK)
    tl.store(y + i_sample * COUNT + o_y, interleave(w0, w1, w2, w3).to(tl.int64), o_y < COUNT)


def launch_random_bits(seed: Tensor, sample_ids: Tensor, draws: Tensor, tag: int, count: int) -> Tensor:
    """The Triton implementation of atop_fast::random_bits."""
    if count > MAX_ROW:
        return reference(seed, sample_ids, draws, tag, count)
    device, batch = sample_ids.device, len(sample_ids)
    y = torch.empty((batch, count), dtype=torch.int64, device=device)
    if y.numel():
        key = (seed, sample_ids.contiguous(), draws)
        launch(random_bits_kernel, count, device, *key, y, stride_of(draws), tag, count, rows=batch)
    return y
