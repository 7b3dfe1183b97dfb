"""The script's arithmetic on a block of weights, called as its workers call it."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels: for each dtype of weights and each rule of scales, another one."""

    def of(self, dtype: torch.dtype, variant: str) -> q.Kernel:
        """Compile one, or skip the test where there is no compiler."""
        names = {torch.bfloat16: "BF16", torch.float16: "F16"}
        try:
            return q.compile_kernel(q.KernelKind("quantize", names.get(dtype, "F32"), variant))
        except q.NoKernel as reason:
            pytest.skip(str(reason))


def compiled_kernel(variant: str = "FEEDBACK") -> q.Kernel:
    """Compile the kernel for bf16 weights, or skip the test where there is no compiler."""
    return Kernels().of(torch.bfloat16, variant)


def quantize_groups(
    groups: torch.Tensor,
    scale_dtype: torch.dtype = torch.float16,
    *,
    kernel: Kernels | None = None,
    importance: torch.Tensor | None = None,
    feedback: q.Feedback | None = None,
    with_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Words (groups, words of 8 codes) and scales (groups,). Scales are searched where `importance` is given."""
    variant = "ABSMAX" if importance is None else "FEEDBACK" if feedback else "SEARCH"
    used = kernel.of(groups.dtype, variant) if kernel else None
    rounding = q.Rounding(with_offset, importance, feedback, used)
    workspace = q.Workspace()
    packing = q.Packing(4, groups.shape[1])
    words, scales = q.make_results(workspace, len(groups), scale_dtype, packing)
    finite = q.quantize_into(words, scales, groups, workspace, rounding)
    assert finite == bool(torch.isfinite(scales).all())
    return words, scales


def quantize_or_refuse(
    groups: torch.Tensor, scale_dtype: torch.dtype, **how: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, or where a group cannot be quantized, which groups can, and scales."""
    words, scales = quantize_groups(groups, scale_dtype, **how)
    finite = torch.isfinite(scales)
    return (words, scales) if finite.all() else (finite, scales.nan_to_num())
