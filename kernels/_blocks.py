"""Square blocks of pixels and pixel offsets, shared by corrupt and assemble.

A program handles a block of pixels of one sample in all channels. Images are [B, C, H W], or [B, H W, C] if IS_LAST;
pixels are numbered in row-major order in either layout.
"""

from collections.abc import Sequence

import triton
import triton.language as tl


@triton.jit
def place(HW, BLOCK: tl.constexpr):
    """The program's sample, its first pixel, its pixels, and the mask of valid pixels."""
    i_block, n_blocks = tl.program_id(0), tl.cdiv(HW, BLOCK)
    i_first = i_block % n_blocks * BLOCK
    o_pixel = i_first + tl.arange(0, BLOCK)
    return (i_block // n_blocks).to(tl.int64), i_first, o_pixel, o_pixel < HW


@triton.jit
def offsets(i_image, i_channel, o_pixel, C, HW, IS_LAST: tl.constexpr):
    """The offsets of pixels of a channel; the image index has 64 bits, and no image has 2**31 elements."""
    o = o_pixel * C + i_channel if IS_LAST else i_channel * HW + o_pixel
    return i_image * C * HW + o


@triton.jit
def read_owners(blocks, i_sample, i_first, H, W, PATCH, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """The copy that masks each pixel, int32; runs of UNIT pixels lie in one block."""
    o_unit = i_first + tl.arange(0, BLOCK // UNIT) * UNIT
    o_block = o_unit // W // PATCH * (W // PATCH) + o_unit % W // PATCH
    b_owner = tl.load(blocks + i_sample * (H // PATCH) * (W // PATCH) + o_block, o_unit < H * W).to(tl.int32)
    return tl.broadcast_to(b_owner[:, None], (BLOCK // UNIT, UNIT)).reshape(BLOCK)


def unit_of(size: Sequence[int], patch: int) -> int:
    """UNIT for images of height and width `size`."""
    return next(unit for unit in (8, 4, 1) if size[1] % unit == 0 and patch % unit == 0)
