"""CUDA source to a kernel that can be launched: NVRTC and the driver, through ``cuda.bindings`` (part of CUDA PyTorch)."""

import ctypes
from contextlib import suppress
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_quantspec.kernels.device import device_properties
from vllm_quantspec.kernels.kept_code import KeptCode

_kept: KeptCode | None = None


def keep_code_in(folder: Path | None) -> None:
    """Keep what is compiled from now on in ``folder``, and take from there what other processes kept; None: neither."""
    global _kept
    _kept = None if folder is None else KeptCode(folder)


def call(name: str, *args):
    """A function of NVRTC or of the CUDA driver, by name; its results without the error code.

    Raises:
        RuntimeError: the function reported an error.
    """
    from cuda.bindings import driver, nvrtc

    error, *results = getattr(nvrtc if name.startswith("nvrtc") else driver, name)(*args)
    if int(error):
        raise RuntimeError(f"{name} failed: {error!r}.")
    return results[0] if len(results) == 1 else results


class Kernel(NamedTuple):
    """A loaded function and its launch configuration, but for the stream."""

    function: object
    config: object


def load(
    source: Path,
    macros: dict[str, int],
    device: int,
    *,
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    overlap: bool,
    features: str = "",
) -> Kernel:
    """The kernel named like ``source``, on ``device``, with ``shared_bytes`` of dynamic shared memory.

    ``grid`` is along x and z; along y a launch chooses, and along x it may. With ``overlap`` a launch may begin under the
    end of the one before (programmatic dependent launch, where the GPU has it): the kernel itself waits before it uses what
    that one writes. ``features`` goes after the architecture: "a" for instructions that only this one has.

    Raises:
        RuntimeError: it does not compile, or a multiprocessor's shared memory cannot hold a block of it.
    """
    from cuda.bindings import driver

    properties = device_properties(device)
    code = compile_source(source, tuple(macros.items()), properties.architecture + features)
    torch.cuda.current_stream()  # makes sure that the primary context is current
    function = call("cuModuleGetFunction", call("cuModuleLoadData", code), source.stem.encode())
    attributes = driver.CUfunction_attribute
    needed = shared_bytes + call("cuFuncGetAttribute", attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
    if needed > properties.shared_memory_per_block:
        raise RuntimeError(
            f"{source.stem} needs {needed} bytes of shared memory per block, {properties.name} has "
            f"{properties.shared_memory_per_block}."
        )
    call("cuFuncSetAttribute", function, attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid[0], 1, grid[1]
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    if overlap and properties.overlaps:
        launch_attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
        launch_attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value.programmaticStreamSerializationAllowed = 1
        launch_attribute.value = value
        config.attrs, config.numAttrs = [launch_attribute], 1
    return Kernel(function, config)


def launch(kernel: Kernel, params: ctypes.Structure, grid_y: int = 1, grid_x: int | None = None) -> None:
    """Launch on PyTorch's current stream, with ``params`` as the kernel's only argument; ``grid_x`` instead of its own."""
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    if grid_x is not None:
        kernel.config.gridDimX = grid_x
    kernel.config.gridDimY, kernel.config.hStream = grid_y, torch.cuda.current_stream().cuda_stream
    call("cuLaunchKernelEx", kernel.config, kernel.function, ctypes.addressof(pointers), 0)


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` [M, n] in 16 bits, or a copy of it whose rows a kernel can read 16 bytes at a time."""
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous()
        if x.data_ptr() % 16:
            x = x.clone()
    return x


class TensorMap(ctypes.Structure):
    """A matrix in memory and the size of the boxes that a kernel copies of it, as the driver encodes them."""

    _fields_ = [("words", ctypes.c_uint64 * 16)]


@lru_cache(1 << 14)
def tensor_map(address: int, rows: int, columns: int, element_size: int, box_columns: int, box_rows: int) -> TensorMap:
    """Of a contiguous matrix. Rows of it and of boxes have multiples of 16 bytes, boxes at most 256 rows and columns.

    Not by the bindings: what theirs writes to is not always aligned to 64 bytes, as it has to be.

    Raises:
        RuntimeError: the driver does not take it.
    """
    encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    room = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 64)
    start = -ctypes.addressof(room) % 64
    unsigned = {1: 0, 2: 1, 4: 2, 8: 4}[element_size]  # CU_TENSOR_MAP_DATA_TYPE_UINT8, ...
    no_interleave, no_swizzle, from_memory_by_256_bytes, zeros_outside = 0, 0, 3, 0
    error = encode(
        ctypes.c_void_p(ctypes.addressof(room) + start),
        ctypes.c_int(unsigned),
        ctypes.c_uint32(2),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(columns * element_size),
        (ctypes.c_uint32 * 2)(box_columns, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        *map(ctypes.c_int, (no_interleave, no_swizzle, from_memory_by_256_bytes, zeros_outside)),
    )
    if error:
        raise RuntimeError(f"cuTensorMapEncodeTiled failed: error {error}.")
    return TensorMap.from_buffer_copy(room, start)


@cache
def _compiler() -> bytes:
    """NVRTC's version and, as that leaves out patches, those of the packages that it may come with."""
    versions = [call("nvrtcVersion"), torch.__version__]
    for name in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        with suppress(PackageNotFoundError):
            versions.append(version(name))
    return repr(versions).encode()


@cache
def compile_source(source: Path, macros: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """The machine code of ``source`` for ``architecture`` ("sm_90"; PTX for "compute_80"), with ``macros`` defined.

    It may include the headers (``*.cuh``) beside it and those of this package. Kept on disk where `keep_code_in` said so.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's log.
    """
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{name}={value}" for name, value in macros)]
    options = [x.encode() for x in options]
    headers = sorted({*source.parent.glob("*.cuh"), *Path(__file__).parent.glob("*.cuh")})
    text, texts, names = source.read_bytes(), [h.read_bytes() for h in headers], [h.name.encode() for h in headers]
    if _kept is not None:
        place = _kept.path([_compiler(), *options, source.name.encode(), text, *names, *texts])
        if (code := _kept.load(place)) is not None:
            return code
    program = call("nvrtcCreateProgram", text, source.name.encode(), len(headers), texts, names)
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(error):
        log = b" " * call("nvrtcGetProgramLogSize", program)
        call("nvrtcGetProgramLog", program, log)
        raise RuntimeError(f"{source.name} did not compile for {architecture}:\n{log.decode()}")
    kind = "PTX" if architecture.startswith("compute_") else "CUBIN"
    code = b" " * call(f"nvrtcGet{kind}Size", program)
    call(f"nvrtcGet{kind}", program, code)
    call("nvrtcDestroyProgram", program)
    if _kept is not None:
        _kept.save(place, code)
    return code
