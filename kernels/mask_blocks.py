"""owner = rank % copies if rank < masked else copies, for blocks ranked by random words     docs/math.md#mask_blocks"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atop_fast.ops.mask_blocks import reference
from atop_fast.randomness import Tag

from ._launch import launch, stride_of
from .philox import interleave, read_key, words_of_groups

# A program compares this many blocks with as many others at a time: 8 pairs per thread.
TILE = 32
# Counting takes quadratic time; beyond this many blocks a sort is faster.
MAX_COUNT = 4096


@triton.jit
def _words(i_first, b_seed, c1, c2, c3, BLOCK: tl.constexpr):
    w0, w1, w2, w3 = words_of_groups(i_first // 4 + tl.arange(0, BLOCK // 4), b_seed, c1, c2, c3)
    return interleave(w0, w1, w2, w3)


@triton.jit(do_not_specialize=["DRAW_STRIDE", "MASKED_STRIDE", "TAG", "COPIES"])
def mask_blocks_kernel(
    seed,  # []
    sample_ids,  # [B]
    draws,  # [B] or []
    masked,  # [B] or []
    owners,  # [B, COUNT]
    DRAW_STRIDE,
    MASKED_STRIDE,
    TAG,
    COPIES,
    COUNT,
    N_BLOCKS: tl.constexpr,  # blocks of BLOCK numbers in COUNT
    BLOCK: tl.constexpr,
):
    i_sample, i_first = (tl.program_id(0) // N_BLOCKS).to(tl.int64), tl.program_id(0) % N_BLOCKS * BLOCK
    b_seed, c1, c2, c3 = read_key(seed, sample_ids, draws, DRAW_STRIDE, TAG, i_sample)
    b_word, o_word = _words(i_first, b_seed, c1, c2, c3, BLOCK), i_first + tl.arange(0, BLOCK)
    b_rank = tl.zeros([BLOCK], tl.int32)
    for i in range(N_BLOCKS):
        o_other = i * BLOCK + tl.arange(0, BLOCK)
        # Padding is the largest word at the last positions, so that it never counts as smaller.
        b_other = tl.where(o_other < COUNT, _words(i * BLOCK, b_seed, c1, c2, c3, BLOCK), 0xFFFFFFFF)
        is_tie = (b_other[None, :] == b_word[:, None]) & (o_other[None, :] < o_word[:, None])
        b_rank += tl.sum(((b_other[None, :] < b_word[:, None]) | is_tie).to(tl.int32), axis=1)
    b_masked = tl.load(masked + i_sample * MASKED_STRIDE)
    b_owner = tl.where(b_rank < b_masked, b_rank % COPIES, COPIES)
    tl.store(owners + i_sample * COUNT + o_word, b_owner.to(tl.uint8), o_word < COUNT)


def launch_mask_blocks(
    seed: Tensor, sample_ids: Tensor, draws: Tensor, masked: Tensor, blocks: int, copies: int
) -> Tensor:
    """The Triton implementation of atop_fast::mask_blocks."""
    if blocks > MAX_COUNT:
        return reference(seed, sample_ids, draws, masked, blocks, copies)
    device, batch = sample_ids.device, len(sample_ids)
    owners = torch.empty((batch, blocks), dtype=torch.uint8, device=device)
    if owners.numel():
        key = (seed, sample_ids.contiguous(), draws, masked)
        numbers = (stride_of(draws), stride_of(masked), int(Tag.MASK), copies, blocks, triton.cdiv(blocks, TILE))
        launch(mask_blocks_kernel, blocks, device, *key, owners, *numbers, rows=batch, block=TILE)
    return owners
