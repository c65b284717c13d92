"""How the kernel for 9 to 64 tokens on Hopper (``int4_linear_fp8.cu``) is launched, and what its inputs become.

Inputs become one or two e4m3 numbers each, with a scale per token and chunk of 128 channels (``int4_linear_fp8.cuh``);
`split` is that in PyTorch. Where they are converted by a launch of their own, the scale is a token's: the same numbers, but
for those below 2^-14 of its largest.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vllm_quantspec.kernels.device import Device

SOURCE = Path(__file__).with_suffix(".cu")
INPUTS_SOURCE = SOURCE.with_name("int4_linear_fp8_inputs.cu")
INPUT_THREADS = 512  # of its CTAs
CHUNK = 128
# Tiles of 8 tokens that a kernel is compiled for.
TOKEN_TILES = (2, 4, 6, 8)
# The largest exponents below which a chunk's scale does not grow any more: what a multiplication in each type can reach.
LEAST_EXPONENT = {torch.bfloat16: -119, torch.float16: -8, torch.float32: -119}


def split(x: torch.Tensor, parts: int = 2) -> torch.Tensor:
    """What ``int4_linear_fp8.cu`` multiplies in the place of ``x`` [tokens, channels]: float32, the sum of its e4m3 parts.

    With two parts the error is at most 2^-17 of the largest of a token's chunk for bfloat16; float16 has more bits.
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
    ready: bool = False  # x is converted by a launch of its own; without producers the warps that multiply fill the ring
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
        return 32 * (self.warps + self.producers)

    def is_resident(self, token_blocks: int, device: Device) -> bool:
        """Whether CTAs that wait for one another, if any, can be on the GPU at once."""
        return self.splits == 1 or self.blocks * self.splits * token_blocks <= device.num_multiprocessors * self.min_ctas

    def work(self, chunks: int, device: Device) -> int:
        """Row tiles times pairs of chunks of the busiest multiprocessor, as a CTA multiplies for all its warps."""
        waves, pairs = -(-self.blocks * self.splits // device.num_multiprocessors), -(-chunks // 2)
        return waves * self.warps * self.tiles * -(-pairs // self.splits)

    def input_blocks(self, chunks: int) -> int:
        """CTAs that convert a block of tokens: of each token for every 16 pairs of chunks."""
        return 8 * self.token_tiles * -(-chunks // (2 * INPUT_THREADS // 32))

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
            "PRODUCERS": self.producers,
            "READY": int(self.ready),
            "SPLITS": self.splits,
            "TURNS": int(self.turns and self.warps > 4),
            "DEPTH": self.depth,
            "MIN_CTAS": self.min_ctas,
        }


class Share(NamedTuple):
    """How a CTA works; the names are those of `Fp8Plan`. Of ``stages`` there are more where that keeps other CTAs away."""

    warps: int
    tiles: int
    ready: bool
    depth: int
    min_ctas: int
    producers: int
    stages: int = 2
    x_stages: int = 2
    turns: bool = False


# The best of sweeps on an H200 (NOTES), by tiles of tokens: where rows alone fill the GPU (and many times), and where CTAs
# share few or many channels. Of several it is the one that leaves the busiest multiprocessor least to do.
_ROWS = {
    2: (Share(8, 1, True, 1, 2, 0, 3, 3), Share(12, 1, True, 1, 2, 0, 2, 3)),
    4: (Share(8, 1, True, 1, 2, 0), Share(12, 1, True, 1, 2, 0)),
    6: (Share(16, 1, True, 1, 1, 0, 2, 3), Share(12, 1, True, 1, 1, 1)),
    8: (Share(16, 1, True, 1, 1, 0, 2, 3), Share(12, 1, True, 1, 1, 1)),
}
_MANY_ROWS = _ROWS | {2: (Share(8, 2, True, 2, 1, 0),), 4: (Share(16, 1, True, 1, 1, 0, 2, 3),)}
_FEW = {
    2: (Share(8, 2, False, 1, 2, 4), Share(8, 3, False, 2, 1, 4)),
    4: (Share(8, 1, True, 1, 2, 0),),
    6: (Share(4, 1, True, 2, 2, 1), Share(12, 1, True, 1, 1, 1)),
    8: (Share(4, 1, True, 2, 2, 1), Share(12, 1, True, 1, 1, 1)),
}
_MANY = {
    2: (Share(8, 2, False, 2, 1, 4),),
    4: (Share(12, 1, True, 2, 1, 0, 2, 3),),
    6: _FEW[6],
    8: _FEW[8],
}
MANY_CHUNKS = 64
MOST_SPLITS = 8
# Row tiles times chunks from which on these products are faster than those of 16 bits: `o` and `qkv` of Llama-3.1-8B.
LEAST_WORK = {2: 8192, 4: 12288, 6: 8192, 8: 8192}


def tiles_of(tokens: int) -> int:
    """Tiles of 8 tokens that a kernel for so many tokens is compiled for."""
    return next(n for n in TOKEN_TILES if 8 * n >= tokens)


def is_faster(tiles: int, chunks: int, tokens: int) -> bool:
    """Whether this kernel is faster than the others for a weight of ``tiles`` x ``chunks`` and 9 to 64 tokens."""
    return tiles * chunks >= LEAST_WORK[tiles_of(tokens)]


def choose_fp8_plan(tiles: int, chunks: int, groups: int, tokens: int, device: Device, parts: int = 2) -> Fp8Plan:
    """The launch for a weight of ``tiles`` x ``chunks``, each chunk of ``groups`` groups, and up to 64 tokens."""
    token_tiles, pairs, sms = tiles_of(tokens), -(-chunks // 2), device.num_multiprocessors
    alone = tiles >= 8 * sms
    shares = (_MANY_ROWS if tiles >= 32 * sms else _ROWS if alone else _MANY if chunks >= MANY_CHUNKS else _FEW)[token_tiles]
    plans = [
        plan_of(share, tiles, splits, token_tiles, CHUNK // groups, device, parts)
        for share in shares
        for splits in range(1, 2 if alone else min(MOST_SPLITS, pairs) + 1)
    ]

    def cost(plan: Fp8Plan) -> tuple[int, bool, int]:
        """Of equals even shares, then two CTAs of a multiprocessor where it has room for them, else few to add up."""
        return plan.work(chunks, device), pairs % plan.splits > 0, -plan.splits if plan.min_ctas > 1 else plan.splits

    return min((plan for plan in plans if plan is not None), key=cost)


def plan_of(
    share: Share, tiles: int, splits: int, token_tiles: int, group_size: int, device: Device, parts: int = 2
) -> Fp8Plan | None:
    """A launch with so many splits, or None where not all of its CTAs would be on the GPU at once."""
    slots, sms = share.warps * share.tiles, device.num_multiprocessors * share.min_ctas
    blocks = -(-tiles // slots)
    if splits == 1:
        blocks = min(tiles, -(-blocks // sms) * sms)
    elif blocks * splits > sms:
        return None
    plan = Fp8Plan(token_tiles=token_tiles, splits=splits, blocks=blocks, parts=parts, **share._asdict())
    room = device.shared_memory_per_block - 1024
    if share.min_ctas > 1:
        room = device.shared_memory_per_multiprocessor // share.min_ctas - 1024
    most = max(2, plan.most_stages(room, group_size))
    # While the launch before ends, a multiprocessor that is free early would take CTAs that others then lack.
    alone = device.shared_memory_per_multiprocessor // (share.min_ctas + 1)
    while share.ready and plan.stages < most and plan.shared_bytes(group_size) + 1024 <= alone:
        plan = plan._replace(stages=plan.stages + 1)
    return plan._replace(stages=min(plan.stages, most))
