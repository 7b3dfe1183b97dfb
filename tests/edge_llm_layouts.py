"""Signed codes of 4 bits out of the buffers that TensorRT Edge-LLM (0.11) makes of a gptq folder.

Its kernels read the codes in an order of their own. Each function here undoes one such order, written from what the
kernel's threads read, and not from Edge-LLM's code that packs.
"""

from __future__ import annotations

import torch


def nibbles_of(buffer: torch.Tensor) -> torch.Tensor:
    """Cut a buffer into codes from -8 to 7, eight of each word of 32 bits, the lowest first: (words, 8)."""
    octets = buffer.contiguous().view(torch.uint8).flatten()
    return (torch.stack([octets & 15, octets >> 4], dim=-1).reshape(-1, 8).int() - 8).to(torch.int8)


def unpack_fragments(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Undo the layout of Int4GroupwiseGemmPluginV2, to codes (rows, columns).

    It has blocks of 128 rows by 64 columns, in each 4 steps of 16 columns, in each 2 halves of 64 rows, in each 128
    threads, and a word a thread. The thread's word has a code of two rows, 32 apart, in four columns: two neighbours,
    and the two that are 8 further. Rows that fill up the last block are zero."""
    blocks = -(-rows // 128)
    words = nibbles_of(buffer).reshape(blocks, columns // 64, 4, 2, 32, 4, 8)
    # A word's codes: neighbour, then row, then the 8 columns further.
    parts = words.reshape(blocks, columns // 64, 4, 2, 32, 4, 2, 2, 2)
    # To block, half, row of two, thread's row; tile, step, further, thread's column, neighbour.
    codes = parts.permute(0, 3, 7, 4, 1, 2, 8, 5, 6).reshape(blocks * 128, columns)
    assert not codes[rows:].any(), "rows that only fill up are not zero"
    return codes[:rows]


def unpack_interleaved(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Undo the layout of Int4GroupwiseGemmPlugin, which is AWQ's for one token, to codes (rows, columns).

    Four rows lie interleaved: 64 columns of each in turn. Of 32 columns there are 4 words, and word j has columns
    2j and 2j + 1 of each 8, first all even ones, then all odd ones."""
    words = nibbles_of(buffer).reshape(rows // 4, columns // 64, 4, 2, 4, 2, 4)
    # Of four rows: tile, row, half of the tile, word, odd, eight.
    return words.permute(0, 2, 1, 3, 6, 4, 5).reshape(rows, columns)


def unpack_marlin(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Undo Marlin's layout, in which Int4MoePlugin has an expert, to codes (rows, columns).

    It has blocks of 16 columns by 64 rows, in each 32 threads, and of each thread the codes of 4 blocks of 16 rows: of
    two rows, 8 apart, and four columns, in each of which the even codes come before the odd ones."""
    words = nibbles_of(buffer).reshape(columns // 16, rows // 64, 8, 4, 4, 8)
    # A thread's codes in the order of 0, 2, 4, 6, 1, 3, 5, 7.
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    codes = words[..., order].reshape(columns // 16, rows // 64, 8, 4, 4, 2, 2, 2)
    # To block of rows, block of 16, row of two, thread's row; block of columns, half, thread's column, neighbour.
    return codes.permute(1, 4, 5, 2, 0, 6, 3, 7).reshape(rows, columns)


def unpack_marlin_scales(buffer: torch.Tensor, rows: int) -> torch.Tensor:
    """Undo Marlin's order of scales, to (groups, rows): of each 64 rows, an 8 by 8 block lies transposed."""
    return buffer.reshape(-1, 8, 8).transpose(1, 2).reshape(-1, rows)
