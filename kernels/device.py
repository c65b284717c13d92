"""What launchers ask of a GPU, in one place: tests put another GPU's limits here to see what a launch does on that one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

# The oldest GPUs that the kernels run on (Ampere), and the oldest on which a launch may begin under the end of the one
# before it (programmatic dependent launch). The only ones with products of warp groups (Hopper).
MIN_CAPABILITY = (8, 0)
OVERLAP_CAPABILITY = (9, 0)
WGMMA_CAPABILITY = (9, 0)


@dataclass(frozen=True)
class Device:
    """Sizes in bytes. ``from_ptx``: machine code is made by the driver, from PTX for ``capability`` (emulation only)."""

    name: str
    capability: tuple[int, int]
    num_multiprocessors: int
    shared_memory_per_block: int
    shared_memory_per_multiprocessor: int
    from_ptx: bool = False

    @property
    def architecture(self) -> str:
        """NVRTC's name of what to compile for."""
        return "{}_{}{}".format("compute" if self.from_ptx else "sm", *self.capability)

    @property
    def overlaps(self) -> bool:
        """Whether a launch may begin under the end of the one before it."""
        return self.capability >= OVERLAP_CAPABILITY

    @property
    def has_wgmma(self) -> bool:
        """Whether kernels may use ``wgmma``; NVRTC's name of the architecture then needs an "a" behind it."""
        return self.capability == WGMMA_CAPABILITY and not self.from_ptx


# Overrides what the driver says of every GPU; see `emulate`.
_emulated: Device | None = None


def emulate(device: Device | None) -> None:
    """Let all launchers of this process, which must have launched nothing yet, take every GPU for ``device``."""
    global _emulated
    _emulated = device
    device_properties.cache_clear()


@cache
def device_properties(index: int) -> Device:
    """Of CUDA device ``index``."""
    if _emulated is not None:
        return _emulated
    p = torch.cuda.get_device_properties(index)
    return Device(
        p.name,
        (p.major, p.minor),
        p.multi_processor_count,
        p.shared_memory_per_block_optin,
        p.shared_memory_per_multiprocessor,
    )
