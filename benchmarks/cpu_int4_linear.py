"""INT4 linear layers on the CPU: this package's kernel, vLLM's, PyTorch's, and the layer in BF16, same run.

    python benchmarks/cpu_int4_linear.py                                  # on this CPU
    python tools/as_avx2.py python benchmarks/cpu_int4_linear.py          # as on one with AVX2 and no AVX-512

Every row calls its candidates in turn and reports medians in milliseconds of CPU time with one thread (elapsed time with
more), as benchmarks/cpu_attention.py does. `vllm_int4` is CPUWNA16, absent where vLLM's library has no such operator;
`torch_int4` is PyTorch's `_weight_int4pack_mm_for_cpu`, whose zero points are bfloat16 products and which has vector code
for bfloat16 alone (`torch_int4_fp16`: with float16, on request); `bf16` is the layer as vLLM runs it here, and
`dequantized` writes the whole weight out in float32 first.

What was tried for the kernel: one output channel at a time for single rows (as fast in groups of 128; in groups of 32 LLVM
leaves the loop scalar, at a third of the speed), sums per lane in memory instead of one per group (not faster; a third of
the speed in groups of 32), a thread pool below 2M products per thread (waking costs more).
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from common import machine, write_json
from cpu_attention import measure

from vllm_quantspec.integration.draft.linears import CpuInt4LinearMethod, LibraryInt4LinearMethod
from vllm_quantspec.kernels import cpu_int4_linear
from vllm_quantspec.weights import QuantizedWeight

DTYPE = torch.bfloat16
# (model, linear, in, out, group)
SHAPES = [
    ("books-4m", "qkv", 256, 512, 128),
    ("books-4m", "down", 640, 256, 128),
    ("books-30m", "gate_up", 512, 2816, 128),
    ("books-30m", "gate_up", 512, 2816, 32),
    ("8B", "qkv", 4096, 6144, 128),
    ("8B", "qkv", 4096, 6144, 64),
    ("8B", "qkv", 4096, 6144, 32),
]
TOKENS = (1, 2, 4, 8, 16, 64, 512)
CANDIDATES = ("ours", "vllm_int4", "torch_int4", "torch_int4_fp16", "bf16", "dequantized")


def random_weight(in_features: int, out_features: int, group: int) -> QuantizedWeight:
    shape = (out_features, in_features // group)
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
    scales = (torch.rand(shape) * 0.01 + 0.001).to(DTYPE)
    return QuantizedWeight(codes, scales, torch.randint(4, 12, shape, dtype=torch.uint8), group)


@contextmanager
def one_rank() -> Iterator[None]:
    """vLLM's parameters ask which rank of how many this is."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()


def layer_of(method, weight: QuantizedWeight):
    layer = torch.nn.Module()
    layer.register_parameter("bias", None)
    method.install(layer, weight)
    return lambda x: method.apply(layer, x)


def torch_int4(weight: QuantizedWeight, dtype: torch.dtype):
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
    scales = weight.scales.float().t()
    zeros = (8 - weight.zeros.float().t()) * scales
    scales_zeros = torch.stack((scales, zeros), -1).to(dtype).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(dtype), packed, weight.group_size, scales_zeros)


def bf16(weight: torch.Tensor):
    """The layer as vLLM's CPU engine runs it: oneDNN where its library has that, else PyTorch."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    return lambda x: layer.cpu_linear(x, layer.weight, None)


def candidates_of(weight: QuantizedWeight, fp16: bool) -> dict:
    shape = (weight.codes.shape[1], weight.codes.shape[0], DTYPE, weight.group_size)
    candidates = {"ours": layer_of(CpuInt4LinearMethod(*shape), weight)}
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        candidates["vllm_int4"] = layer_of(LibraryInt4LinearMethod(*shape), weight)
    candidates["torch_int4"] = torch_int4(weight, DTYPE)
    if fp16:
        candidates["torch_int4_fp16"] = torch_int4(weight, torch.float16)
    exact = weight.dequantize()
    candidates["bf16"] = bf16(exact.to(DTYPE))
    packed = cpu_int4_linear.pack(weight.codes, weight.scales, weight.zeros, weight.group_size)
    arrays, buffer = tuple(t.numpy() for t in packed), torch.empty_like(exact)

    def dequantized(x: torch.Tensor) -> torch.Tensor:
        cpu_int4_linear._dequantize(0, len(exact), *arrays, weight.group_size // 2, buffer.numpy())
        return F.linear(x.float(), buffer).to(DTYPE)

    candidates["dequantized"] = dequantized
    return candidates


def run(seconds: float, tokens: list[int], fp16: bool) -> list[dict]:
    rows = []
    for model, name, in_features, out_features, group in SHAPES:
        weight = random_weight(in_features, out_features, group)
        exact, candidates = weight.dequantize(), candidates_of(weight, fp16)
        for number in tokens:
            x = torch.randn(number, in_features).to(DTYPE)
            expected = F.linear(x.float(), exact)
            errors = {}
            for candidate, call in candidates.items():
                errors[candidate] = float(f"{(call(x).float() - expected).norm() / expected.norm():.1e}")
                assert errors[candidate] < 0.01, f"{candidate} computes something else: {errors}"
            shape = {"model": model, "linear": name, "in": in_features, "out": out_features, "group": group}
            times = measure({c: lambda call=call, x=x: call(x) for c, call in candidates.items()}, seconds)
            rows.append({**shape, "tokens": number, **times, "error": errors})
            show(rows[-1])
    return rows


COLUMNS = ("model", "linear", "in", "out", "group", "tokens", *CANDIDATES, "spread")


def show(row: dict) -> None:
    print("".join(f"{row.get(name, ''):>{max(8, len(name) + 2)}}" for name in COLUMNS), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1, help="measuring time per row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--fp16", action="store_true", help="also PyTorch's operator in float16 (slow: scalar code)")
    parser.add_argument("--json", help="write the result here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    torch.cpu._init_amx()  # asks Linux for the tile registers; vLLM's kernel only uses them
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    print(machine())
    show(dict(zip(COLUMNS, COLUMNS, strict=True)))
    with one_rank():
        rows = run(arguments.seconds, arguments.tokens, arguments.fp16)
    if arguments.json:
        write_json(arguments.json, rows, unit="milliseconds per layer, median", dtype="bfloat16 inputs")


if __name__ == "__main__":
    main()
