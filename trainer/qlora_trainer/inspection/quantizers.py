"""Squared error of quantizing a matrix, by the formulas of each format. Nothing is packed.

Block-wise formats take consecutive weights of a row-major matrix, as ``bitsandbytes.functional.quantize_4bit`` does;
the last block may be shorter. NF4 and FP4: Dettmers et al. 2023 (QLoRA), section 3. INT8: Dettmers et al. 2022
(LLM.int8), section 3.1. The 4-bit integers are the linear formats that the literature compares them with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from bitsandbytes import functional as bnb

BLOCK_SIZES = (32, 64, 128, 256)
NESTED_BLOCK = 256
"""Absmax constants that share one of their own: ``bitsandbytes.functional.quantize_4bit``, ``compress_statistics``."""
GRID = 1 << 12
"""Steps from -1 to 1 at which the nearest code is tabled."""
TINY = 1e-30
"""Least absmax that is divided by: a block of zeros stays one."""


def codes(kind: str, device: torch.device | None = None) -> torch.Tensor:
    """Return the 16 values of NF4 or FP4 in [-1, 1], ascending.

    Args:
        kind: "nf4" or "fp4".
        device: where they are wanted.

    """
    found: torch.Tensor = bnb.get_4bit_type(kind, device=device or "cpu").float()
    return found.sort().values


@dataclass(frozen=True)
class CodeFinder:
    """Finds nearest codes, in a third of the time that ``torch.bucketize`` takes."""

    table: torch.Tensor
    """Codes in [-1, 1], ascending."""
    middles: torch.Tensor
    """Midpoints between neighbouring codes, then infinity."""
    first: torch.Tensor
    """For each step of a grid over [-1, 1] the first code that can be the nearest one there; it or the next is."""

    @classmethod
    def of(cls, table: torch.Tensor) -> CodeFinder:
        """Return a finder for codes that are at least three steps of the grid apart."""
        middles = (table[1:] + table[:-1]) / 2
        # One step lower: a value may be rounded to the next one.
        edges = torch.linspace(-1, 1, GRID + 1, device=table.device) - 2 / GRID
        endless = torch.full_like(middles[:1], torch.inf)
        return cls(table, torch.cat([middles, endless]), torch.bucketize(edges, middles, out_int32=True))

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Return the nearest code for each value of [-1, 1]; of two the lower one."""
        flat = values.view(-1)
        first = torch.index_select(self.first, 0, torch.add(GRID / 2, flat, alpha=GRID / 2).int())
        index = first + (flat > torch.index_select(self.middles, 0, first))
        return torch.index_select(self.table, 0, index).view(values.shape)


@lru_cache(maxsize=8)
def code_finder(kind: str, device: torch.device) -> CodeFinder:
    """Return the finder of NF4's or FP4's codes."""
    return CodeFinder.of(codes(kind, device))


@dataclass(frozen=True)
class BlockErrors:
    """Sums over each block, with weights w = a·c + r: of absmax a, code c and residual r."""

    absmax: torch.Tensor
    residual: torch.Tensor
    """Σ r²."""
    cross: torch.Tensor
    """Σ r·c."""
    code: torch.Tensor
    """Σ c²."""

    def squared_error(self, absmax: torch.Tensor | None = None) -> float:
        """Return the error, where each block is restored with another absmax if one is given.

        Σ (w - b·c)² = Σ r² - 2·(b - a)·Σ r·c + (b - a)²·Σ c².
        """
        total = self.residual.double()
        if absmax is not None:
            change = (absmax - self.absmax).double()
            total = total - 2 * change * self.cross + change.square() * self.code
        return float(total.sum())


def block_errors(weights: torch.Tensor, block: int, kind: str) -> BlockErrors:
    """Quantize weights in blocks to the codes of a format.

    Args:
        weights: fp32, one dimension.
        block: weights that share an absmax.
        kind: "nf4" or "fp4".

    """
    finder = code_finder(kind, weights.device)
    parts = [_block_errors(part, finder) for part in _blocks(weights, block)]
    return joined(parts)


def joined(parts: list[BlockErrors]) -> BlockErrors:
    """Return the blocks of several parts as one."""
    fields = ("absmax", "residual", "cross", "code")
    return BlockErrors(*(torch.cat([getattr(part, field) for part in parts]) for field in fields))


def _block_errors(blocks: torch.Tensor, finder: CodeFinder) -> BlockErrors:
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / absmax.clamp(min=TINY)).unsqueeze(1)).clamp_(-1, 1)
    code = finder.nearest(scaled)
    residual = torch.addcmul(blocks, code, absmax.unsqueeze(1), value=-1)
    return BlockErrors(
        absmax, residual.square().sum(dim=1), torch.linalg.vecdot(residual, code), code.square().sum(dim=1)
    )


def _blocks(weights: torch.Tensor, block: int) -> Iterator[torch.Tensor]:
    """Yield whole blocks as rows, then what is left as a row of its own."""
    whole = len(weights) // block * block
    if whole:
        yield weights[:whole].view(-1, block)
    if whole < len(weights):
        yield weights[whole:].view(1, -1)


@dataclass(frozen=True)
class NestedConstants:
    """Absmax constants that are quantized themselves, as ``quantize_4bit`` does with ``compress_statistics``."""

    restored: torch.Tensor
    offset: float
    """Their mean, which is taken off before they are quantized to 8 bits."""


def quantize_constants(absmax: torch.Tensor) -> NestedConstants:
    """Quantize absmax constants to 8 bits in blocks of 256, and restore them. QLoRA, section 3, double quantization."""
    offset = absmax.mean()
    packed, state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    return NestedConstants(bnb.dequantize_blockwise(packed, state) + offset, float(offset))


def int8_error(weights: torch.Tensor) -> float:
    """Return the squared error of INT8 with a scale for each row: round(127·w / absmax), of w in fp16.

    Args:
        weights: [outputs, inputs].

    """
    half = weights.half()
    absmax = half.abs().amax(dim=1, keepdim=True).float()
    scaled = torch.round(half * (127 / absmax.clamp(min=TINY)))
    return float((scaled * (absmax / 127) - weights.float()).square().sum(dtype=torch.float64))


# ------------------------------------------------------------------------------------- linear formats, for comparison


def symmetric_scale(blocks: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the step of symmetric quantization, absmax / (2^(bits-1) - 1), for each row."""
    absmax: torch.Tensor = blocks.abs().amax(dim=1, keepdim=True)
    return absmax.clamp(min=TINY) / float(2 ** (bits - 1) - 1)


def affine_constants(blocks: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return step and zero point of asymmetric quantization for each row.

    (max - min) / (2^bits - 1), and the integer that stands for 0, round(-min / step). The range includes 0.
    """
    least, most = blocks.amin(dim=1, keepdim=True).clamp(max=0), blocks.amax(dim=1, keepdim=True).clamp(min=0)
    step = (most - least).clamp(min=TINY) / (2**bits - 1)
    return step, torch.round(-least / step)


def symmetric(blocks: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantize each row to integers of [-(2^(bits-1) - 1), 2^(bits-1) - 1] and restore it."""
    step = symmetric_scale(blocks, bits)
    restored: torch.Tensor = torch.round(blocks / step) * step
    return restored


def affine(blocks: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantize each row to integers of [0, 2^bits - 1] with a zero point and restore it."""
    step, zero = affine_constants(blocks, bits)
    return ((torch.round(blocks / step) + zero).clamp(0, 2**bits - 1) - zero) * step


def linear_errors(weights: torch.Tensor, block: int, bits: int = 4) -> tuple[float, float]:
    """Return the squared errors of symmetric and asymmetric integers."""
    parts = list(_blocks(weights, block))
    return (
        sum(float((symmetric(part, bits) - part).square().sum(dtype=torch.float64)) for part in parts),
        sum(float((affine(part, bits) - part).square().sum(dtype=torch.float64)) for part in parts),
    )
