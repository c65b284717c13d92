"""How the kernel for more than 16 tokens (``int4_linear_wide.cu``) is launched: plans for `int4_linear.launch`.

Its CTAs share the row tiles and the input channels. A CTA reads all tokens' inputs of its channels, so fewer channels with
more rows cost less of the L2 cache; but sums of channels have to be added up across CTAs, and every multiprocessor should
have the same to do.
"""

from pathlib import Path
from typing import NamedTuple

from vllm_quantspec.kernels.device import Device

SOURCE = Path(__file__).with_suffix(".cu")
CHUNK = 128
# Tiles of 8 tokens that a kernel is compiled for.
TOKEN_TILES = (2, 4, 6, 8)
# A cluster is on one of the parts of a Hopper GPU that have this many multiprocessors, or two more.
CLUSTER_MULTIPROCESSORS = 16


class WidePlan(NamedTuple):
    """How a launch divides its work; the names are the macros' of the kernel."""

    warps: int  # that multiply
    stages: int  # chunks of 128 channels in a warp's ring of codes
    tiles: int  # row tiles that a warp multiplies at most
    token_tiles: int  # tiles of 8 tokens of a CTA
    splits: int  # CTAs that share the input channels of their row tiles, all of them on the GPU at once; 1 to 8
    blocks: int  # CTAs along the rows
    x_stages: int = 4  # chunks in the ring of x
    producers: int = 4  # warps that fill it, no more than its chunks
    min_ctas: int = 1  # CTAs that registers allow on a multiprocessor
    wgmma: bool = False  # products of warp groups; needs a Hopper GPU and groups of four warps
    overlap: bool = True  # programmatic dependent launch
    cluster: bool = False  # CTAs of the same rows add up in shared memory; needs a Hopper GPU and more than one split

    @property
    def uses_workspace(self) -> bool:
        """Whether CTAs add up in memory."""
        return self.splits > 1 and not self.cluster

    @property
    def source(self) -> Path:
        return SOURCE

    @property
    def threads(self) -> int:
        return 32 * (self.warps + self.producers)

    @property
    def features(self) -> str:
        """What to add to NVRTC's name of the architecture."""
        return "a" if self.wgmma else ""

    def shared_bytes(self, group_size: int) -> int:
        unit = 1024 + 64 * (CHUNK // group_size)
        rings = self.x_stages * self.token_tiles * 2048 + self.warps * self.stages * self.tiles * unit
        sums = self.warps * self.tiles * self.token_tiles * 512 if self.cluster else 0
        return max(rings, sums) + 16 * self.x_stages

    def most_stages(self, room: int, group_size: int) -> int:
        """How many stages of codes fit into so many bytes."""
        x = self.x_stages * (self.token_tiles * 2048 + 16)
        return (room - x) // (self.warps * self.tiles * (1024 + 64 * (CHUNK // group_size)))

    def macros(self, group_size: int, bf16: bool, rotated: bool = False) -> dict[str, int]:
        """What the kernel's source is compiled with."""
        return {
            "GROUP_SIZE": group_size,
            "IS_BF16": int(bf16),
            "WARPS": self.warps,
            "STAGES": self.stages,
            "TILES": self.tiles,
            "TOKEN_TILES": self.token_tiles,
            "X_STAGES": self.x_stages,
            "PRODUCERS": self.producers,
            "SPLITS": self.splits,
            "MIN_CTAS": self.min_ctas,
            "WGMMA": int(self.wgmma),
            "CLUSTER": int(self.cluster),
            "ROTATED": int(rotated),
        }


def choose_wide_plan(tiles: int, chunks: int, groups: int, tokens: int, device: Device) -> WidePlan:
    """The launch for a weight of ``tiles`` x ``chunks``, each chunk of ``groups`` groups, and this many tokens."""
    most = 8 * TOKEN_TILES[-1]
    token_tiles = next(n for n in TOKEN_TILES if 8 * n >= min(tokens, most))
    token_blocks = 1 << (-(-tokens // most) - 1).bit_length()  # few different kernels to compile
    # As measured with 32 tokens on an H200 (NOTES): rows alone where they fill the GPU, else channels in as many shares as
    # leave a CTA 16 row tiles; and sums through memory, not clusters.
    per_warp, shares = (1, 1) if tiles >= 8 * device.num_multiprocessors else (2, min(8, chunks))
    plans = [
        plan_of(tiles, splits, 8, per_warp, token_tiles, token_blocks, CHUNK // groups, device, cluster=False)
        for splits in range(1, shares + 1)
    ]
    plans = [plan for plan in plans if plan is not None]
    return min(plans, key=lambda plan: (-(-tiles // plan.blocks) * -(-chunks // plan.splits), -plan.splits))


def plan_of(
    tiles: int,
    splits: int,
    warps: int,
    per_warp: int,
    token_tiles: int,
    token_blocks: int,
    group_size: int,
    device: Device,
    cluster: bool = True,
) -> WidePlan | None:
    """A launch with up to ``per_warp`` row tiles for each of ``warps`` warps, or None if there is none.

    ``cluster``: whether CTAs that share channels are to be a cluster, where there are such.
    """
    wgmma = device.has_wgmma
    cluster = cluster and wgmma and splits > 1
    sms = device.num_multiprocessors
    if cluster:  # how many multiprocessors clusters find room on
        sms = max(1, sms // CLUSTER_MULTIPROCESSORS) * (CLUSTER_MULTIPROCESSORS // splits) * splits
    waves = -(-tiles * splits * token_blocks // (sms * warps * per_warp))
    if splits > 1 and waves > 1:
        return None  # they wait for one another, so all have to be there
    blocks = min(tiles, max(1, waves * sms // (splits * token_blocks)))
    if blocks * warps * per_warp < tiles:
        blocks = -(-tiles // (warps * per_warp))
    if splits > 1 and blocks * splits * token_blocks > sms:
        return None
    plan = WidePlan(warps, 1, per_warp, token_tiles, splits, blocks, wgmma=wgmma, cluster=cluster)
    # Two CTAs per multiprocessor where registers allow it: the next launch's fills its ring while this one's adds up.
    half, whole = device.shared_memory_per_multiprocessor // 2 - 1024, device.shared_memory_per_block - 1024
    layouts = [(4, 4, 1, whole), (3, 3, 1, whole), (2, 2, 1, whole)]
    if warps <= 8 and per_warp * token_tiles <= 8:
        layouts = [(max(3, 12 // token_tiles), 2, 2, half), *layouts]
    for x_stages, producers, min_ctas, room in layouts:
        plan = plan._replace(x_stages=x_stages, producers=producers, min_ctas=min_ctas)
        plan = plan._replace(stages=min(plan.most_stages(room, group_size), 8))
        if plan.stages >= 3 and plan.shared_bytes(group_size) <= room:
            return plan
    return plan if plan.stages >= 2 and plan.shared_bytes(group_size) <= room else None
