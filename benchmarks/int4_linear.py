"""INT4 and INT8 linears at decode sizes against BF16 (cuBLAS), Machete, Marlin, W4A8 and tinygemm. Needs a CUDA GPU.

    python benchmarks/int4_linear.py --json OUT.json --plot OUT.png
    python benchmarks/int4_linear.py --methods bf16 ours int8 int8_rotated fp8 --json OUT.json      # 8-bit weights
    python benchmarks/int4_linear.py --methods bf16 ours fp8_products fp8_inputs --tokens 16 32 64  # Hopper
    python benchmarks/int4_linear.py --tune [--bits 8]       # launch configurations of every shape
    python benchmarks/int4_linear.py --tune --fp8-products --tokens 16 32 64                        # Hopper

Times are medians of CUDA graph replays; every launch reads another weight, more than the L2 cache holds in turn.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from common import write_json

DEVICE = "cuda"
DTYPE = torch.bfloat16
GROUP = 128
LAYERS = 32
SHAPES = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
LM_HEAD = {"lm_head": (4096, 128256)}
TOKENS = (1, 2, 4, 5, 8, 12, 16, 24, 32, 48, 64)
PRINTED = (
    "bf16", "machete", "marlin", "w4a8", "tinygemm", "ours", "fp8_products", "fp8_inputs", "rotated", "rescored", "fp8",
    "int8", "int8_rotated",
)  # fmt: skip


def width(name):
    return max(9, len(name) + 1)


def median(run, rep=60):
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(run, rep=rep, return_mode="median") * 1e3


def copies(shape, bytes_per_weight):
    """Weights to take in turn, so that none is still in the L2 cache."""
    return min(LAYERS, max(2, -(-(256 << 20) // int(shape[0] * shape[1] * bytes_per_weight)) + 1))


def random_packed(shape, bits=4):
    channels, rows = shape
    groups = channels // GROUP
    codes = torch.randint(0, 256, (rows // 16, groups, 256 * bits), dtype=torch.uint8, device=DEVICE)
    scales = torch.empty(rows // 16, groups, 1, 8, 2, 1, device=DEVICE).uniform_(0.001, 0.002) * (1 if bits == 4 else 1 / 24)
    zeros = torch.randint(6, 10, scales.shape, device=DEVICE)
    zeros = 128 + zeros if bits == 4 else 304 + 2 * zeros  # levels
    return codes, torch.cat((scales, zeros), dim=-1).to(DTYPE)


class Ours:
    name = "ours"
    bits = 4
    bytes_per_weight = 0.5 + 4 / GROUP

    def __init__(self, plan=None, rotated=False):
        self.plan, self.rotated = plan, rotated

    def make(self, shape):
        return random_packed(shape, self.bits)

    def __call__(self, x, weight):
        if self.plan is None:
            return torch.ops.vllm_quantspec.int4_linear(x, *weight, None, self.rotated)
        from vllm_quantspec.kernels import int4_linear

        return int4_linear.launch(x, *weight, None, x.new_empty(len(x), weight[0].shape[0] * 16), self.plan)


class Rotated(Ours):
    """With the inputs rotated in the kernel (``weight_rotation: hadamard``)."""

    name = "rotated"

    def __init__(self):
        super().__init__(rotated=True)


class Int8(Ours):
    """Weights in 8 bits (``draft_weights: int8`` and ``mixed``)."""

    name = "int8"
    bits = 8
    bytes_per_weight = 1 + 4 / GROUP


class Int8Rotated(Int8):
    name = "int8_rotated"

    def __init__(self):
        super().__init__(rotated=True)


class Fp8Products(Ours):
    """The kernel with FP8 products, for 9 to 64 tokens, with its own choice of a plan; inputs in two e4m3 parts."""

    name = "fp8_products"
    parts = 2

    def __call__(self, x, weight):
        from vllm_quantspec.kernels import int4_linear
        from vllm_quantspec.kernels.device import device_properties

        tiles, chunks = weight[0].shape[:2]
        if not int4_linear.MAX_ALIKE < len(x) <= int4_linear.MAX_FP8:
            raise ValueError("FP8 products are for 9 to 64 tokens")
        plan = int4_linear.choose_fp8_plan(tiles, chunks, weight[1].shape[2], len(x), device_properties(0), self.parts)
        return int4_linear.launch(x, *weight, None, x.new_empty(len(x), tiles * 16), plan)


class Fp8Inputs(Fp8Products):
    """Half of the products: inputs in one e4m3 part, as QSpec's own draft has them in 8 bits."""

    name = "fp8_inputs"
    parts = 1


class Fp8:
    """The best peer in 8 bits: vLLM's FP8 Marlin, e4m3 with a scale per output channel."""

    name = "fp8"
    bytes_per_weight = 1

    def make(self, shape):
        from types import SimpleNamespace

        from vllm.model_executor.layers.quantization.utils import marlin_utils_fp8

        channels, rows = shape
        weight = torch.randn(channels, rows, device=DEVICE).mul_(0.05).to(torch.float8_e4m3fn)
        layer = torch.nn.Module()
        layer.input_size_per_partition, layer.output_size_per_partition = channels, rows
        layer.orig_dtype = layer.params_dtype = DTYPE
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(torch.full((1, rows), 0.01, device=DEVICE), requires_grad=False)
        marlin_utils_fp8.prepare_fp8_layer_for_marlin(layer)
        return SimpleNamespace(layer=layer, apply=marlin_utils_fp8.apply_fp8_marlin_linear, shape=shape)

    def __call__(self, x, weight):
        layer, (channels, rows) = weight.layer, weight.shape
        return weight.apply(x, layer.weight, layer.weight_scale, layer.workspace, rows, channels, None)


class Rescored(Ours):
    """The draft's output layer: INT4, and its largest logits again from the BF16 weight."""

    name = "rescored"
    bytes_per_weight = Ours.bytes_per_weight + 2

    def make(self, shape):
        return Ours.make(self, shape), Bf16.make(self, shape)

    def __call__(self, x, weight):
        from vllm_quantspec.kernels.rescore_logits import rescore_logits

        return rescore_logits(super().__call__(x, weight[0]), x, weight[1])


class Bf16:
    name = "bf16"
    bytes_per_weight = 2

    def make(self, shape):
        return torch.randn(shape[1], shape[0], dtype=DTYPE, device=DEVICE) * 0.02

    def __call__(self, x, weight):
        return F.linear(x, weight)


class Machete:
    name = "machete"
    bytes_per_weight = 0.5 + 2.5 / GROUP

    def make(self, shape, kernel=None):
        """``kernel``: vLLM's class, instead of the one it chooses."""
        from vllm_quantspec.integration.draft.linears import SCALES, WEIGHT, ZEROS, LibraryInt4LinearMethod
        from vllm_quantspec.weights import QuantizedWeight

        join_group_of_one()
        channels, rows = shape
        method = LibraryInt4LinearMethod(channels, rows, DTYPE, GROUP)
        if kernel is not None:
            method.kernel = kernel(method.kernel.config, WEIGHT, SCALES, ZEROS)
        self.kernel = type(method.kernel).__name__
        layer = torch.nn.Module()
        layer.bias = None
        codes = torch.randint(0, 16, (rows, channels), dtype=torch.uint8, device=DEVICE)
        scales = torch.empty(rows, channels // GROUP, device=DEVICE).uniform_(0.001, 0.002).to(DTYPE)
        zeros = torch.randint(6, 10, scales.shape, dtype=torch.uint8, device=DEVICE)
        method.install(layer, QuantizedWeight(codes, scales, zeros, GROUP))
        return method, layer

    def __call__(self, x, weight):
        return weight[0].apply(weight[1], x)


class Marlin(Machete):
    """vLLM's kernel for Ampere, on the same layer; with one workspace for all launches, as in an engine."""

    name = "marlin"

    def make(self, shape):
        if (reason := marlin_problem()) is not None:
            raise RuntimeError(reason)
        return super().make(shape, marlin_kernel())

    def __call__(self, x, weight):
        from vllm.model_executor.layers.quantization.utils.marlin_utils import apply_gptq_marlin_linear

        kernel, layer = weight[0].kernel, weight[1]
        codes, scales, zeros = kernel._get_weight_params(layer)[:3]
        channels, rows = kernel.config.partition_weight_shape
        return apply_gptq_marlin_linear(
            input=x,
            weight=codes,
            weight_scale=scales,
            weight_zp=zeros,
            workspace=marlin_workspace(),
            wtype=kernel.config.weight_type,
            input_size_per_partition=channels,
            output_size_per_partition=rows,
            input_dtype=x.dtype,
        )


def marlin_kernel():
    from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel

    return MarlinLinearKernel


@cache
def marlin_workspace():
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new

    return marlin_make_workspace_new(torch.device(DEVICE, 0), 4)


def try_marlin():
    """One small product on Marlin; raises an error where it does not run."""
    method = Marlin()
    weight = Machete.make(method, (1024, 1024), marlin_kernel())
    method(torch.randn(16, 1024, dtype=DTYPE, device=DEVICE), weight)
    torch.cuda.synchronize()


@cache
def marlin_problem():
    """Why Marlin does not run here, or None: a build of vLLM may lack its machine code for a GPU.

    It is tried in a process of its own, as an error of CUDA may leave the process that met it without a GPU.
    """
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import int4_linear; int4_linear.try_marlin()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    if done.returncode == 0:
        return None
    said = [line.strip() for line in done.stderr.splitlines() if "rror" in line]
    return f"vLLM's Marlin kernel does not run on this GPU: {said[-1] if said else f'exit code {done.returncode}'}"


@cache
def join_group_of_one():
    """vLLM's parameters ask which part of the model is theirs."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)


class W4A8:
    """vLLM's CUTLASS kernel for Hopper: symmetric weights, inputs in FP8 with a scale per token; rounding them is timed."""

    name = "w4a8"
    bytes_per_weight = 0.5 + 1 / GROUP

    def make(self, shape):
        from vllm import _custom_ops as ops

        channels, rows = shape
        words = torch.randint(-(1 << 31), (1 << 31) - 1, (rows, channels // 8), dtype=torch.int32, device=DEVICE)
        scales = torch.empty(channels // GROUP, rows, device=DEVICE).uniform_(1, 16).to(torch.float8_e4m3fn)
        of_rows = torch.full((rows, 1), 1e-3, device=DEVICE)
        return ops.cutlass_encode_and_reorder_int4b(words.t()), ops.cutlass_pack_scale_fp8(scales), of_rows

    def __call__(self, x, weight):
        from vllm import _custom_ops as ops

        x, of_tokens = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
        codes, scales, of_rows = weight
        return ops.cutlass_w4a8_mm(x, codes, scales, GROUP, of_rows, of_tokens)


class TinyGemm:
    name = "tinygemm"
    bytes_per_weight = 0.5 + 4 / GROUP

    def make(self, shape):
        channels, rows = shape
        packed = torch.randint(0, 256, (rows, channels // 2), dtype=torch.uint8, device=DEVICE)
        packed = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
        scales = torch.empty(channels // GROUP, rows, 2, device=DEVICE).uniform_(0.001, 0.002).to(DTYPE)
        return packed, scales

    def __call__(self, x, weight):
        return torch.ops.aten._weight_int4pack_mm(x, weight[0], GROUP, weight[1])


def copy_bandwidth():
    """Bytes per second that a large copy reads and writes."""
    x = torch.randint(-99, 99, (1 << 29,), dtype=torch.int32, device=DEVICE)
    y = torch.empty_like(x)
    return 8 * x.numel() / (median(lambda: torch.neg(x, out=y)) * 1e-6)


def weights_of(method, shapes):
    return {name: [method.make(s) for _ in range(copies(s, method.bytes_per_weight))] for name, s in shapes.items()}


def time_model(method, weights, tokens, rep=60):
    """All linears, layer by layer."""
    inputs = {name: torch.randn(tokens, SHAPES[name][0], dtype=DTYPE, device=DEVICE) for name in weights}
    order = [(inputs[name], weights[name][i % len(weights[name])]) for i in range(LAYERS) for name in weights]

    def run():
        for x, weight in order:
            method(x, weight)

    run()
    return median(run, rep)


def time_shape(method, weights, shape, tokens, rep=20):
    x = torch.randn(tokens, shape[0], dtype=DTYPE, device=DEVICE)

    def run():
        for weight in weights:
            method(x, weight)

    run()
    return median(run, rep) / len(weights)


def plot(rows, gpu, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["weights"] == "8B, 32 layers"]
    figure, axis = plt.subplots(figsize=(7, 4))
    for name in ("ours", "machete", "marlin", "w4a8", "tinygemm"):
        points = [(r["tokens"], r["bf16_us"] / r[f"{name}_us"]) for r in rows if r.get(f"{name}_us")]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.plot(
        [r["tokens"] for r in rows], [r["bf16_us"] / r["floor_us"] for r in rows], "--", color="#666", label="bytes alone"
    )
    axis.axhline(1, color="#999", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks([r["tokens"] for r in rows], [str(r["tokens"]) for r in rows])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens")
    axis.set_ylabel("times faster than BF16")
    axis.set_title(f"INT4 linears, all of the 8B shape, {gpu}")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--plot", type=Path, help="draw the plot here")
    parser.add_argument("--tune", action="store_true", help="time launch configurations")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of a weight, with --tune")
    parser.add_argument("--fp8-products", action="store_true", help="of the kernel with FP8 products, with --tune")
    parser.add_argument("--shapes", nargs="*", help="only these shapes, with --tune")
    parser.add_argument("--tokens", type=int, nargs="*", help="only these numbers of tokens")
    parser.add_argument("--methods", nargs="*", help="only these methods")
    args = parser.parse_args()
    if args.plot and args.json and not torch.cuda.is_available():
        results = json.loads(args.json.read_text())
        return plot(results["rows"], results["machine"]["gpu"], args.plot)
    import vllm_quantspec.kernels.int4_linear  # noqa: F401  registers the operator

    torch.manual_seed(0)
    tokens = args.tokens or TOKENS
    if args.tune:
        from int4_linear_tuning import tune

        return tune(args.shapes, tokens, args.bits, args.fp8_products)
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    rows, kernels = {}, {}
    methods = Bf16(), Ours(), Fp8Products(), Fp8Inputs(), Rotated(), Int8(), Int8Rotated(), Fp8(), Rescored()
    methods += Machete(), Marlin(), W4A8(), TinyGemm()
    for method in methods:
        if args.methods and method.name not in args.methods:
            continue
        try:
            weights = weights_of(method, LM_HEAD if method.name == "rescored" else SHAPES | LM_HEAD)
        except Exception as error:  # a peer that does not work here must not cost the others' numbers
            print(f"{method.name} left out: {error!r:.400}")
            continue
        kernels[method.name] = getattr(method, "kernel", method.name)
        model = {name: weights[name] for name in SHAPES if name in weights}
        for count in tokens:
            jobs = {"8B, 32 layers": lambda m=model, n=count, f=method: time_model(f, m, n)} if model else {}
            for name, shape in (LM_HEAD | (SHAPES if count == 1 and model else {})).items():
                jobs[name] = lambda w=weights[name], s=shape, n=count, f=method: time_shape(f, w, s, n)
            for name, job in jobs.items():
                sizes = SHAPES.values() if name not in SHAPES | LM_HEAD else [(SHAPES | LM_HEAD)[name]]
                size = sum(k * n for k, n in sizes) * Ours.bytes_per_weight * (LAYERS if len(sizes) > 1 else 1)
                row = rows.setdefault((name, count), {"weights": name, "tokens": count, "int4_bytes": int(size)})
                row["floor_us"] = size / bandwidth * 1e6
                row["int8_floor_us"] = size / Ours.bytes_per_weight * Int8.bytes_per_weight / bandwidth * 1e6
                try:
                    row[f"{method.name}_us"] = job()
                except Exception as error:
                    print(f"{method.name}, {name}, {count} tokens: {' '.join(str(error).split())[:200]}")
        del weights, model, jobs
        torch.cuda.empty_cache()
    for row in rows.values():
        for name in PRINTED[1:]:
            if row.get(f"{name}_us") and row.get("bf16_us"):
                row[f"{name}_speedup"] = row["bf16_us"] / row[f"{name}_us"]
        if row.get("ours_us") and row.get("rotated_us"):
            row["rotation_cost"] = row["rotated_us"] / row["ours_us"] - 1
        if row.get("ours_us"):
            row["ours_tb_per_s"] = row["int4_bytes"] / row["ours_us"] / 1e6
    rows = [{k: round(v, 3) if isinstance(v, float) else v for k, v in r.items()} for r in rows.values()]
    print(
        f"{'weights':15}{'M':>4}"
        + "".join(f"{name:>{width(name)}}" for name in PRINTED)
        + f"{'floor':>8}{'ratio':>7}{'TB/s':>6}{'rotation':>10}"
    )
    for r in sorted(rows, key=lambda r: r["weights"]):
        times = "".join(f"{r.get(name + '_us', float('nan')):{width(name)}.1f}" for name in PRINTED)
        print(
            f"{r['weights']:15}{r['tokens']:4}{times}{r['floor_us']:8.1f}{r.get('ours_speedup', 0):7.2f}"
            f"{r.get('ours_tb_per_s', 0):6.2f}{r.get('rotation_cost', float('nan')):10.1%}"
        )
    if args.json:
        write_json(args.json, rows, copy_bandwidth_tb_s=round(bandwidth / 1e12, 3), kernels=kernels)
    if args.plot:
        plot(rows, torch.cuda.get_device_name(), args.plot)


if __name__ == "__main__":
    main()
