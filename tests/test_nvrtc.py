"""Compiling and loading a kernel, against stand-ins for NVRTC, the driver and the GPU."""

import ctypes
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from vllm_quantspec.kernels import (
    decode_attention,
    int4_experts,
    int4_linear,
    int4_linear_fp8,
    int4_linear_wide,
    marlin_dequantize,
    marlin_linear,
    nvrtc,
)
from vllm_quantspec.kernels.device import Device

SIZES = {"grid": (132, 2), "threads": 288, "shared_bytes": 0, "overlap": True}
STATIC_BYTES = 700


def gpu_like(capability, from_ptx=False) -> Device:
    return Device("a GPU", capability, 132, 99 << 10, 100 << 10, from_ptx)


@pytest.fixture
def capability():
    """The GPU's, in a list that a test may change."""
    return [(9, 0)]


@pytest.fixture
def calls(monkeypatch, capability):
    """The functions of the bindings that were called; compiling fails where a macro BROKEN is defined."""
    seen = []

    def compile_program(program, count, options):
        seen.append(("nvrtcCompileProgram", options))
        return (int(b"-DBROKEN=1" in options),)

    def function(name, *results):
        return lambda *args: seen.append((name, *args)) or (0, *results)

    driver, compiler = ModuleType("cuda.bindings.driver"), ModuleType("cuda.bindings.nvrtc")
    driver.CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared", CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES="static"
    )
    driver.cuFuncGetAttribute = function("static", STATIC_BYTES)
    driver.cuModuleLoadData, driver.cuModuleGetFunction = function("load", "module"), function("get", "kernel")
    driver.cuFuncSetAttribute = function("set")
    driver.cuFails = lambda: (700,)
    driver.cuLaunchKernelEx = function("launch")
    for name in ("CUlaunchConfig", "CUlaunchAttribute", "CUlaunchAttributeValue"):
        setattr(driver, name, SimpleNamespace)
    driver.CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="overlap")
    compiler.nvrtcCreateProgram, compiler.nvrtcDestroyProgram = function("create", "program"), function("destroy")
    compiler.nvrtcVersion = function("version", 13, 0)
    compiler.nvrtcCompileProgram = compile_program
    for what in ("ProgramLog", "CUBIN", "PTX"):
        setattr(compiler, f"nvrtcGet{what}Size", function("size", 3))
        setattr(compiler, f"nvrtcGet{what}", function("bytes"))
    bindings = ModuleType("cuda.bindings")
    bindings.driver, bindings.nvrtc = driver, compiler
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(nvrtc, "device_properties", lambda index: gpu_like(capability[0]))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    nvrtc.compile_source.cache_clear()
    yield seen
    nvrtc.compile_source.cache_clear()


@pytest.mark.parametrize(
    "module",
    [decode_attention, int4_experts, int4_linear, int4_linear_fp8, int4_linear_wide, marlin_dequantize, marlin_linear],
)
def test_a_kernel_is_compiled_once_and_loaded_by_its_name(module, calls):
    for shared_bytes in (1000, 2000):
        kernel = nvrtc.load(module.SOURCE, {"A": 1, "B": 2}, 0, **(SIZES | {"shared_bytes": shared_bytes}))
        assert kernel.function == "kernel"
        assert calls[-3:] == [
            ("get", "module", module.SOURCE.stem.encode()),
            ("static", "static", "kernel"),
            ("set", "kernel", "shared", shared_bytes),
        ]
    assert [c for c in calls if c[0] == "nvrtcCompileProgram"] == [
        ("nvrtcCompileProgram", [b"--gpu-architecture=sm_90", b"--std=c++17", b"-DA=1", b"-DB=2"])
    ]
    assert b'extern "C"' in module.SOURCE.read_bytes() and module.SOURCE.stem.encode() + b"(" in module.SOURCE.read_bytes()


@pytest.mark.parametrize("module", [decode_attention, int4_experts, int4_linear_fp8, int4_linear_wide, marlin_linear])
def test_the_compiler_gets_what_a_source_includes(module, calls):
    """Headers include headers; none is anywhere but beside the source."""
    nvrtc.load(module.SOURCE, {}, 0, **SIZES)
    ((*_, count, texts, names),) = (c for c in calls if c[0] == "create")
    given = {name.decode(): text.decode() for name, text in zip(names, texts, strict=True)}
    included, new = set(), {module.SOURCE.read_text()}
    while new:
        found = {name for text in new for name in re.findall(r'#include "(.+)"', text)} - included
        assert found <= set(given)
        included, new = included | found, {given[name] for name in found}
    assert "ptx.cuh" in included and count == len(given)


def test_instructions_of_one_architecture_are_asked_for(calls):
    nvrtc.load(int4_linear_wide.SOURCE, {}, 0, **SIZES, features="a")
    assert ("nvrtcCompileProgram", [b"--gpu-architecture=sm_90a", b"--std=c++17"]) in calls


def test_what_fails_says_so(calls):
    with pytest.raises(RuntimeError, match="int4_linear.cu did not compile for sm_90"):
        nvrtc.load(int4_linear.SOURCE, {"BROKEN": 1}, 0, **SIZES)
    with pytest.raises(RuntimeError, match="cuFails failed: 700"):
        nvrtc.call("cuFails")


@pytest.mark.parametrize(
    ("gpu", "overlap", "overlaps"), [((9, 0), True, True), ((9, 0), False, False), ((8, 9), True, False)]
)
def test_a_launch_overlaps_where_it_may_and_can(gpu, overlap, overlaps, capability, calls):
    capability[0] = gpu
    kernel = nvrtc.load(int4_linear.SOURCE, {}, 0, **(SIZES | {"overlap": overlap}))
    nvrtc.launch(kernel, int4_linear.Params(tokens=5), grid_y=3)
    (name, config, function, *_), c = calls[-1], kernel.config
    assert (name, config, function) == ("launch", c, "kernel")
    assert (c.gridDimX, c.gridDimY, c.gridDimZ, c.blockDimX, c.hStream) == (132, 3, 2, 288, 77)
    assert ("overlap" in [a.id for a in getattr(c, "attrs", [])]) is overlaps
    nvrtc.launch(kernel, int4_experts._Params(pairs=8), grid_y=8, grid_x=24)
    assert (c.gridDimX, c.gridDimY, c.gridDimZ) == (24, 8, 2)


def test_too_much_shared_memory_says_so(calls):
    limit = (99 << 10) - STATIC_BYTES
    nvrtc.load(int4_linear.SOURCE, {}, 0, **(SIZES | {"shared_bytes": limit}))
    with pytest.raises(RuntimeError, match="int4_linear needs 101377 bytes of shared memory per block, a GPU has 101376"):
        nvrtc.load(int4_linear.SOURCE, {}, 0, **(SIZES | {"shared_bytes": limit + 1}))


def test_code_for_an_emulated_gpu_is_left_to_the_driver(calls, monkeypatch):
    monkeypatch.setattr(nvrtc, "device_properties", lambda index: gpu_like((8, 6), from_ptx=True))
    nvrtc.load(int4_linear.SOURCE, {}, 0, **SIZES)
    assert ("nvrtcCompileProgram", [b"--gpu-architecture=compute_86", b"--std=c++17"]) in calls


@pytest.fixture
def compiled(calls, tmp_path):
    """Load a kernel as another process would; how often the compiler ran for it."""

    def load(**macros) -> int:
        before = len(calls)
        nvrtc.compile_source.cache_clear()
        assert nvrtc.load(int4_linear.SOURCE, macros, 0, **SIZES).function == "kernel"
        return sum(name == "nvrtcCompileProgram" for name, *_ in calls[before:])

    nvrtc.keep_code_in(tmp_path / "kernels")
    yield load
    nvrtc.keep_code_in(None)


def test_code_is_kept_for_other_processes(compiled, tmp_path):
    assert compiled(A=1) == 1 and compiled(A=1) == 0
    assert compiled(A=2) == 1 and compiled(A=1) == compiled(A=2) == 0
    assert len(list((tmp_path / "kernels").iterdir())) == 2


def test_code_of_other_sources_is_another(compiled, tmp_path, monkeypatch):
    """A header counts as the source does."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in int4_linear.SOURCE.parent.glob("*.cu*"):
        (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(int4_linear, "SOURCE", folder / int4_linear.SOURCE.name)
    assert compiled() == 1 and compiled() == 0
    (folder / "int4_linear.cuh").write_text("// changed\n")
    assert compiled() == 1


def test_damaged_code_is_compiled_again(compiled, tmp_path):
    compiled()
    (file,) = (tmp_path / "kernels").iterdir()
    for damaged in (b"", file.read_bytes()[:-1], b"x" + file.read_bytes()[1:]):
        file.write_bytes(damaged)
        assert compiled() == 1 and compiled() == 0


def test_a_folder_that_cannot_be_had_costs_time_alone(compiled, tmp_path):
    (tmp_path / "file").write_text("")
    nvrtc.keep_code_in(tmp_path / "file" / "kernels")
    assert compiled() == 1 and compiled() == 1


def test_a_tensor_map_is_encoded_where_the_driver_wants_it(monkeypatch):
    """Aligned to 64 bytes; strides in bytes, sizes in elements, the inner dimension first."""
    seen, errors = [], [0, 1]

    def encode(to, kind, rank, address, sizes, strides, box, steps, *rest):
        numbers = [n.value for n in (kind, rank, address, *rest)]
        seen.append((numbers, *map(list, (sizes, strides, box, steps))))
        assert to.value % 64 == 0
        ctypes.memmove(to, bytes(range(128)), 128)
        return errors.pop(0)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuTensorMapEncodeTiled=encode))
    nvrtc.tensor_map.cache_clear()
    assert bytes(nvrtc.tensor_map(4096, 10, 64, 2, 16, 8)) == bytes(range(128))
    nvrtc.tensor_map(4096, 10, 64, 2, 16, 8)
    assert seen == [([1, 2, 4096, 0, 0, 3, 0], [64, 10], [128], [16, 8], [1, 1])]
    with pytest.raises(RuntimeError, match="error 1"):
        nvrtc.tensor_map(4096, 10, 64, 4, 16, 8)
    nvrtc.tensor_map.cache_clear()
