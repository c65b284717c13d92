"""Older GPUs that a newer one can stand in for: `pytest --emulate-gpu rtx4090 tests/test_int4_linear.py ...`.

The CUDA kernels are compiled as PTX for the older one's compute capability and translated by the driver; launches do not
overlap, and the number of multiprocessors and the shared memory are the older one's (CUDA C++ programming guide, table of
technical specifications per compute capability). Not emulated: clocks, caches,
memory, and FlashAttention.
"""

from vllm_quantspec.kernels.device import Device

KIB = 1 << 10
# Itself, for tests of what launchers choose on it.
H200 = Device("NVIDIA H200", (9, 0), 132, 227 * KIB, 228 * KIB)
GPUS = {
    "a100": Device("NVIDIA A100, emulated", (8, 0), 108, 163 * KIB, 164 * KIB, from_ptx=True),
    "a6000": Device("NVIDIA RTX A6000, emulated", (8, 6), 84, 99 * KIB, 100 * KIB, from_ptx=True),
    "rtx3090": Device("NVIDIA GeForce RTX 3090, emulated", (8, 6), 82, 99 * KIB, 100 * KIB, from_ptx=True),
    "rtx4090": Device("NVIDIA GeForce RTX 4090, emulated", (8, 9), 128, 99 * KIB, 100 * KIB, from_ptx=True),
}
