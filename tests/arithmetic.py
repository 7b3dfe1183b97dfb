"""The script's arithmetic on a block of weights, called as its workers call it."""

from __future__ import annotations

import pytest
import torch

import quantize_int4 as q

EXTREME_WEIGHTS = {  # of noise (groups, columns)
    "gaussian": lambda noise: noise,
    "heavy tails": lambda noise: noise**5,
    "of one sign": lambda noise: noise.square(),
    "two values": torch.sign,
    "all magnitudes": lambda noise: (
        noise * 2.0 ** torch.arange(-140, 110).repeat(2)[: len(noise), None]
    ),
    "one weight": lambda noise: (
        noise * torch.nn.functional.one_hot(torch.tensor(7), noise.shape[1])
    ),
    "not finite": lambda noise: torch.where(
        noise > 2, torch.inf, torch.where(noise < -2, torch.nan, noise)
    ),
}


def compiled_kernel() -> q.Kernel:
    """Compile the kernel with all that it can do, or skip the test where there is no compiler."""
    try:
        return q.compile_kernel(True)
    except q.QuantizeError as reason:
        pytest.skip(str(reason))


def quantize_groups(
    groups: torch.Tensor,
    scale_dtype: torch.dtype = torch.float16,
    *,
    kernel: q.Kernel | None = None,
    importance: torch.Tensor | None = None,
    feedback: tuple[torch.Tensor, torch.Tensor] | None = None,
    with_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Words (groups, words of 8 codes) and scales (groups,). Scales are searched where `importance` is given."""
    rounding = q.Rounding(with_offset, importance, feedback, kernel)
    words, scales = q.quantize_groups(groups, scale_dtype, q.Workspace(), rounding)
    return words.clone(), scales.clone()


def quantize_or_refuse(
    groups: torch.Tensor, scale_dtype: torch.dtype, **how: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, or where a group cannot be quantized, which groups can, and scales."""
    words, scales = quantize_groups(groups, scale_dtype, **how)
    finite = torch.isfinite(scales)
    return (words, scales) if finite.all() else (finite, scales.nan_to_num())
