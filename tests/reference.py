"""An independent, slow quantizer to compare with: numpy and Python integers, one group and one word at a time."""

from __future__ import annotations

import numpy as np
import torch


def round_to_bfloat16(value: np.float32) -> np.float32:
    """To nearest, ties to even, on the bits."""
    bits = int(np.float32(value).view(np.uint32))
    bits += 0x7FFF + (bits >> 16 & 1)
    return np.uint32(bits & 0xFFFF0000).view(np.float32)


ROUND_SCALE = {
    torch.float16: lambda value: np.float32(np.float16(value)),
    torch.bfloat16: round_to_bfloat16,
    torch.float32: np.float32,
}


def reference_quantize(
    weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype = torch.float16
) -> tuple[list[list[int]], list[list[float]]]:
    """Codes (rows, padded columns) and scales (rows, groups) as nested lists."""
    codes, scales = [], []
    for row in weight.to(torch.float32).numpy():
        row = np.concatenate([row, np.zeros(-len(row) % group_size, np.float32)])
        row_codes, row_scales = [], []
        for group in row.reshape(-1, group_size):
            scale = ROUND_SCALE[scale_dtype](np.float32(max(abs(w) for w in group)) / np.float32(7))
            row_scales.append(float(scale))
            for w in group:
                quotient = np.rint(np.float32(w) / scale) if scale else 0
                row_codes.append(int(min(max(quotient, -8), 7)))
        codes.append(row_codes)
        scales.append(row_scales)
    return codes, scales


def pack_words(codes: list[int]) -> list[int]:
    """Eight 4-bit two's-complement codes to a signed 32-bit word, the first in the lowest bits."""
    words = []
    for start in range(0, len(codes), 8):
        word = sum((code & 15) << (4 * i) for i, code in enumerate(codes[start : start + 8]))
        words.append(word - (1 << 32) if word >= 1 << 31 else word)
    return words


def pack_rows(codes: list[list[int]]) -> torch.Tensor:
    """Pack each row of codes: int32 (rows, words)."""
    return torch.tensor([pack_words(row) for row in codes], dtype=torch.int32)


def reference_words(
    weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, list[list[float]]]:
    """Words that hold code + 8, (rows, words), and scales (rows, groups), as the formats for engines have them."""
    codes, scales = reference_quantize(weight, group_size, scale_dtype)
    return pack_rows([[code + 8 for code in row] for row in codes]), scales
