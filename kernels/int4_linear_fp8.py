"""How the kernel for 9 to 64 tokens on Hopper (``int4_linear_fp8.cu``) is launched, and what its inputs become.

Inputs become one or two e4m3 numbers each, with a scale per token and chunk of 128 channels (``int4_linear_fp8.cuh``); `split` is
that in PyTorch.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vllm_quantspec.kernels.device import Device  # noqa: F401

SOURCE = Path(__file__).with_suffix(".cu")
INPUTS_SOURCE = SOURCE.with_name("int4_linear_fp8_inputs.cu")
CHUNK = 128
# Tiles of 8 tokens that a kernel is compiled for.
TOKEN_TILES = (2, 4, 6, 8)
# The largest exponents below which a chunk's scale does not grow any more: what a multiplication in each type can reach.
LEAST_EXPONENT = {torch.bfloat16: -119, torch.float16: -8}


def split(x: torch.Tensor, parts: int = 2) -> torch.Tensor:
    """What ``int4_linear_fp8.cu`` multiplies in the place of ``x`` [tokens, channels]: float32, the sum of its e4m3 parts.

    With two parts the error is below 2^-17 of the largest of a token's chunk for bfloat16; float16 has more bits than they hold.
    """
    tokens, channels = x.shape
    chunks = F.pad(x.float(), (0, -channels % CHUNK)).view(tokens, -1, CHUNK)
    exponent = torch.frexp(chunks.abs().amax(-1, keepdim=True)).exponent - 1
    exponent = exponent.clamp_(LEAST_EXPONENT[x.dtype], 125)
    rest = torch.ldexp(chunks, 7 - exponent)
    out = torch.zeros_like(rest)
    for _ in range(parts):
        part = rest.to(torch.float8_e4m3fn).float()
        out, rest = out + part, rest - part
    return torch.ldexp(out, exponent - 7).view(tokens, -1)[:, :channels]


class Fp8Plan(NamedTuple):
    """How a launch divides its work; the names are the macros' of the kernel."""

    warps: int  # that multiply; four are a warp group
    stages: int  # in a warp's ring of codes, of two chunks of 128 channels each
    tiles: int  # row tiles that a warp multiplies at most
    token_tiles: int  # tiles of 8 tokens of a CTA
    splits: int  # CTAs that share the input channels of their row tiles, all of them on the GPU at once; 1 to 8
    blocks: int  # CTAs along the rows
    x_stages: int = 2  # in the ring of x, likewise
    producers: int = 4  # warps that convert x and fill its ring
    ready: bool = False  # x is converted by a launch of its own; one warp fills the ring
    turns: bool = True  # warp groups ask for products one after another
    depth: int = 1  # 2: a chunk's row tile is multiplied while the sums of the one before are added up
    min_ctas: int = 1  # CTAs that registers allow on a multiprocessor
    parts: int = 2  # e4m3 numbers of an input
    overlap: bool = True  # programmatic dependent launch

    source = SOURCE
    features = "a"

    @property
    def uses_workspace(self) -> bool:
        return self.splits > 1

    @property
    def threads(self) -> int:
        return 32 * (self.warps + (1 if self.ready else self.producers))

    def input_bytes(self, group_size: int) -> int:
        """Of two chunks of the converted inputs of a block of tokens."""
        return 2 * self.token_tiles * (1024 * self.parts + 64 * (CHUNK // group_size))

    def shared_bytes(self, group_size: int) -> int:
        codes = 2 * (1024 + 64 * (CHUNK // group_size))
        return self.x_stages * (self.input_bytes(group_size) + 16) + self.warps * self.stages * self.tiles * codes

    def most_stages(self, room: int, group_size: int) -> int:
        """How many stages of codes fit into so many bytes."""
        x = self.x_stages * (self.input_bytes(group_size) + 16)
        return (room - x) // (self.warps * self.tiles * 2 * (1024 + 64 * (CHUNK // group_size)))

    def input_macros(self, group_size: int, bf16: bool, rotated: bool = False) -> dict[str, int]:
        """What the conversion of the inputs is compiled with."""
        return {
            "GROUP_SIZE": group_size,
            "IS_BF16": int(bf16),
            "TOKEN_TILES": self.token_tiles,
            "PARTS": self.parts,
            "ROTATED": int(rotated),
        }

    def macros(self, group_size: int, bf16: bool, rotated: bool = False) -> dict[str, int]:
        """What the kernel's source is compiled with."""
        return self.input_macros(group_size, bf16, rotated and not self.ready) | {
            "WARPS": self.warps,
            "STAGES": self.stages,
            "TILES": self.tiles,
            "X_STAGES": self.x_stages,
            "PRODUCERS": 1 if self.ready else self.producers,
            "READY": int(self.ready),
            "SPLITS": self.splits,
            "TURNS": int(self.turns and self.warps > 4),
            "DEPTH": self.depth,
            "MIN_CTAS": self.min_ctas,
        }
