"""CUDA source to a kernel that can be launched: NVRTC and the driver, through ``cuda.bindings`` (part of CUDA PyTorch)."""

from functools import cache
from pathlib import Path

import torch


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


def load(source: Path, macros: dict[str, int], device: int, shared_bytes: int):
    """The kernel named like ``source``, on ``device``, with ``shared_bytes`` of dynamic shared memory."""
    from cuda.bindings import driver

    properties = torch.cuda.get_device_properties(device)
    cubin = compile_source(source, tuple(macros.items()), f"sm_{properties.major}{properties.minor}")
    torch.cuda.current_stream()  # makes sure that the primary context is current
    function = call("cuModuleGetFunction", call("cuModuleLoadData", cubin), source.stem.encode())
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    call("cuFuncSetAttribute", function, attribute, shared_bytes)
    return function


@cache
def compile_source(source: Path, macros: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """The machine code of ``source`` for ``architecture`` ("sm_90"), with ``macros`` (name, value) defined.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's log.
    """
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{name}={value}" for name, value in macros)]
    options = [x.encode() for x in options]
    program = call("nvrtcCreateProgram", source.read_bytes(), source.name.encode(), 0, [], [])
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(error):
        log = b" " * call("nvrtcGetProgramLogSize", program)
        call("nvrtcGetProgramLog", program, log)
        raise RuntimeError(f"{source.name} did not compile for {architecture}:\n{log.decode()}")
    cubin = b" " * call("nvrtcGetCUBINSize", program)
    call("nvrtcGetCUBIN", program, cubin)
    call("nvrtcDestroyProgram", program)
    return cubin
