"""Weights in 8 bits as the kernels read them, see ``blocks.h``: MXINT8.

That is a format of "OCP Microscaling Formats (MX) Specification v1.0" (2023): 32 neighbours of a
row are integers of 8 bits that share a power of two. What they stand for is exact in bfloat16.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 32
# 127 of the exponent's byte, and 6 because the codes are in 64ths.
_EXPONENT_BIAS = 127 + 6
_LARGEST_CODE = 127


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight [O, I], or its transpose; see :meth:`of`."""

    rows: torch.Tensor
    """uint8 [O, I + I / 32]: the codes of a row, and behind them the exponents of its blocks."""
    is_transposed: bool = False

    @classmethod
    def of(cls, weight: torch.Tensor) -> Blocks:
        """``weight`` [O, I] rounded; I must be a multiple of 32 and every number finite.

        The largest number of a block loses at most 1 / 128 of itself, the others at most as much.

        >>> Blocks.of(torch.tensor([[1.0] * 31 + [-0.3]])).dense(torch.float32)[0, 30:].tolist()
        [1.0, -0.296875]
        """
        outputs, inputs = weight.shape
        blocks = weight.detach().float().view(outputs, inputs // BLOCK, BLOCK)
        _, exponents = torch.frexp(blocks.abs().amax(-1))  # the largest is 0.5 to 1 of 2 to it
        # Its byte is above 6, so that the power of two of the codes is a normal float32.
        exponents = (exponents - 1 + 127).clamp_(_EXPONENT_BIAS - 126, 254)
        scaled = torch.ldexp(blocks, (_EXPONENT_BIAS - exponents)[..., None])
        codes = scaled.round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
        codes = codes.view(outputs, inputs).view(torch.uint8)
        return cls(torch.cat([codes, exponents.to(torch.uint8)], dim=1))

    @property
    def shape(self) -> torch.Size:
        """[O, I], transposed or not."""
        outputs, row_bytes = self.rows.shape
        inputs = row_bytes // (BLOCK + 1) * BLOCK
        return torch.Size((inputs, outputs) if self.is_transposed else (outputs, inputs))

    def __len__(self) -> int:
        return self.shape[0]

    def t(self) -> Blocks:
        """The same memory as the transpose."""
        return Blocks(self.rows, not self.is_transposed)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers that the codes stand for; exact in bfloat16 and float32."""
        inputs = self.rows.shape[1] // (BLOCK + 1) * BLOCK
        codes = self.rows[:, :inputs].view(torch.int8).unflatten(1, (-1, BLOCK)).float()
        exponents = self.rows[:, inputs:].int() - _EXPONENT_BIAS
        weight = torch.ldexp(codes, exponents[..., None]).flatten(1).to(dtype)
        return weight.t() if self.is_transposed else weight


Weight = torch.Tensor | Blocks
"""What the kernels multiply by: float32, bfloat16, or 8 bits."""

# The third is for `format` in multiply.cpp and decode.cpp.
_FORMATS = {torch.float32: 0, torch.bfloat16: 1}
_IN_BLOCKS = 2


def format_of(weight: Weight) -> int:
    """The number by which the kernels know how ``weight`` is held."""
    return _IN_BLOCKS if isinstance(weight, Blocks) else _FORMATS[weight.dtype]


def memory_of(weight: Weight) -> torch.Tensor:
    """The tensor that holds it."""
    return weight.rows if isinstance(weight, Blocks) else weight


def strides_of(weight: Weight) -> tuple[int, int]:
    """Its steps from output to output and from input to input; of blocks those of the codes."""
    if isinstance(weight, Blocks):
        row, column = weight.rows.stride()
        return (column, row) if weight.is_transposed else (row, column)
    outputs, inputs = weight.stride()
    return outputs, inputs
