"""The kernel for the experts of a few tokens, against its reference; its layout, against what it was packed from."""

import pytest
import torch
import torch.nn.functional as F

from vllm_quantspec.kernels import int4_experts as module
from vllm_quantspec.kernels.int4_experts import Packed, dequantize, int4_experts, pack, reference
from vllm_quantspec.weights import quantize_weight

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
on_a_gpu = pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")

# Experts, hidden size, width, experts per token, and the groups of both weights: units of 64 and 128 channels, which several
# CTAs or one share evenly or not.
SMALL = [
    (4, 128, 64, 2, 128, 64),
    (3, 256, 192, 1, 64, 32),
    (2, 640, 64, 2, 128, 32),
    (5, 64, 320, 3, 32, 64),
    (7, 1152, 384, 2, 128, 128),
]
LARGE = [
    (128, 2048, 768, 8, 128, 128),
    (60, 2048, 1408, 4, 128, 128),
    (8, 4096, 14336, 2, 128, 128),
    (9, 2048, 768, 3, 64, 32),
]


def random_experts(shape, dtype, device=DEVICE):
    """Both weights packed, and dequantized float32 [experts, out, in]."""
    number, hidden, width, _, *groups = shape
    generator = torch.Generator(device).manual_seed(sum(shape))
    packed, plain = [], []
    for rows, channels, group in ((2 * width, hidden, groups[0]), (hidden, width, groups[1])):
        weight = torch.randn(number * rows, channels, generator=generator, device=device) * 2 * channels**-0.5
        rounded = quantize_weight(weight.to(dtype), group, method="nearest")
        parts = (x.unflatten(0, (number, rows)) for x in (rounded.codes, rounded.scales, rounded.zeros))
        packed.append(pack(*parts))
        plain.append(rounded.dequantize().view(number, rows, channels))
    return packed, plain


def random_tokens(shape, tokens, dtype, device=DEVICE):
    """Strided inputs, weights and experts."""
    number, hidden, _, chosen, *_ = shape
    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn(tokens, hidden + 8, generator=generator, device=device).to(dtype)[:, :hidden]
    weights, ids = torch.randn(tokens, number, generator=generator, device=device).softmax(-1).topk(chosen, dim=-1)
    return x, weights, ids


# --- Layout and reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SMALL)
def test_packed_weights_read_back(shape, dtype):
    packed, plain = random_experts(shape, dtype)
    for one, weight in zip(packed, plain, strict=True):
        assert torch.equal(dequantize(one), weight)


def test_a_lane_holds_what_it_multiplies():
    """The registers of a warp as ``int4_experts.cu`` takes them from the packed bytes, against mma.m16n8k16's A operand."""
    shape = (2, 128, 128, 1, 64, 32)
    number, hidden, width, _, *groups = shape
    packed, plain = random_experts(shape, torch.float16, "cpu")
    for (codes, scales, zeros), weight, group in zip(packed, plain, groups, strict=True):
        out_features, in_features = weight.shape[1:]
        lane = torch.arange(32)
        g, q = lane // 4, lane % 4
        code_bytes, zero_bytes = (x.contiguous().view(torch.uint8).flatten() for x in (codes, zeros))
        scale_values = scales.flatten()

        def words(memory, at):  # int64 [32]: what each lane loads from its address
            return sum(memory[at + i].long() << 8 * i for i in range(4))

        for expert in range(number):
            for row in range(in_features // 16):
                for strip in range(out_features // 64):
                    base = (expert * in_features // 16 + row) * out_features * 8 + strip * 512 + lane * 16
                    in_group = expert * in_features // group + row * 16 // group
                    zero = words(zero_bytes, in_group * out_features // 2 + strip * 32 + g * 4)
                    for j in range(4):
                        word = words(code_bytes, base + 4 * j)
                        # Registers 0 to 3 of the operand are nibbles 0, 2, 1, 3 and, 16 bits higher, those four further on.
                        for register, nibble in enumerate((0, 2, 1, 3)):
                            high_row = register % 2
                            output = strip * 64 + 16 * j + g + 8 * high_row
                            scale = scale_values[in_group * out_features + strip * 64 + 8 * g + 2 * j + high_row].float()
                            offset = zero >> 4 * j + 16 * high_row & 15
                            for half in range(2):
                                channel = 16 * row + 2 * q + half + 8 * (register // 2)
                                code = word >> 4 * nibble + 16 * half & 15
                                assert torch.equal((code - offset).float() * scale, weight[expert, output, channel])


def test_the_reference_is_the_dequantized_experts():
    shape = SMALL[3]
    (w13, w2), (gate_up, down) = random_experts(shape, torch.bfloat16, "cpu")
    x, weights, ids = random_tokens(shape, 6, torch.bfloat16, "cpu")
    for name, activation in module.ACTIVATIONS.items():
        rows = []
        for token in range(6):
            gate, up = (gate_up[ids[token]] @ x[token].float()).chunk(2, dim=-1)
            rows.append((weights[token, :, None] * (down[ids[token]] @ (activation(gate) * up)[..., None])[..., 0]).sum(0))
        expected = torch.stack(rows)
        out = reference(x, weights, ids, w13, w2, name)
        assert (out.float() - expected).norm() < 0.004 * expected.norm()


def test_what_does_not_fit_is_refused():
    shape = SMALL[0]
    (w13, w2), _ = random_experts(shape, torch.bfloat16, "cpu")
    x, weights, ids = random_tokens(shape, 2, torch.bfloat16, "cpu")
    coarse = Packed(w13.codes, w13.scales[:, :1], w13.zeros[:, :1].contiguous())
    for arguments, what in (
        ((x.float(), weights, ids, w13, w2), "x must be torch.bfloat16"),
        ((x[:, :64], weights, ids, w13, w2), "are not those of x"),
        ((x, weights[:1], ids, w13, w2), "topk_weights"),
        ((x, weights, ids.to(torch.int16), w13, w2), "topk_ids must be int32"),
        ((x, weights, ids, w13, w2, "relu"), "activation must be one of"),
        ((x, weights, ids, w13, w2), "runs on a GPU, not on cpu"),
        ((x, weights, ids, coarse._replace(scales=w13.scales.repeat(1, 8, 1)), w2), "groups of 32, 64 or 128"),
    ):
        with pytest.raises(ValueError, match=what):
            int4_experts(*arguments)
    with pytest.raises(ValueError, match="cannot be packed"):
        pack(*(torch.zeros(1, 40, n, dtype=torch.uint8) for n in (64, 2, 2)))


# --- The kernel -------------------------------------------------------------------------------------------------------


def check(shape, dtype, activation="silu", all_tokens=(1, 2, 3, 5, 8, 9, 16, 32), same=False, plans=None) -> None:
    (w13, w2), _ = random_experts(shape, dtype)
    for tokens in all_tokens:
        x, weights, ids = random_tokens(shape, tokens, dtype)
        if same:
            ids = ids[:1].repeat(tokens, 1)
        ids = ids.int() if tokens % 2 else ids
        expected = reference(x, weights, ids, w13, w2, activation).float()
        out = int4_experts(x, weights, ids, w13, w2, activation, plans)
        error = ((out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
        print(f"{shape} {dtype} {tokens} tokens: {error:.2g}")
        assert out.dtype == dtype and out.isfinite().all()
        assert error < (0.008 if dtype == torch.bfloat16 else 0.0015), (tokens, error)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SMALL)
def test_kernel_computes_what_the_reference_does(shape, dtype):
    check(shape, dtype)


@on_a_gpu
@pytest.mark.parametrize("shape", LARGE)
def test_large_experts(shape):
    check(shape, torch.bfloat16)


@on_a_gpu
@pytest.mark.parametrize("shape", [SMALL[1], SMALL[4], LARGE[3]])
def test_all_tokens_choose_the_same_experts(shape):
    check(shape, torch.bfloat16, same=True)


@on_a_gpu
@pytest.mark.parametrize("activation", module.ACTIVATIONS)
def test_other_activations(activation):
    check((3, 128, 64, 2, 64, 32), torch.float16, activation)


@on_a_gpu
def test_more_tokens_than_a_launch_takes():
    check(SMALL[4], torch.bfloat16, all_tokens=(64, 65, 150))


@on_a_gpu
@pytest.mark.parametrize("warps", [1, 3, 8])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("strips", [1, 5])
def test_other_plans(warps, splits, strips):
    shape = (5, 2048, 640, 2, 128, 64)
    plan = module.Plan(warps, splits, 1, strips)
    check(shape, torch.float16, all_tokens=(1, 6, 11), plans=(plan, plan))


@on_a_gpu
@pytest.mark.parametrize("shape", [SMALL[0], LARGE[3]])
def test_a_token_is_the_same_among_others(shape):
    (w13, w2), _ = random_experts(shape, torch.bfloat16)
    x, weights, ids = random_tokens(shape, 70, torch.bfloat16)
    together = int4_experts(x, weights, ids, w13, w2)
    for i in (0, 2, 31, 69):
        assert torch.equal(int4_experts(x[i : i + 1], weights[i : i + 1], ids[i : i + 1], w13, w2)[0], together[i])
    for tokens in (7, 8, 9, 33):
        assert torch.equal(int4_experts(x[:tokens], weights[:tokens], ids[:tokens], w13, w2), together[:tokens])
    for _ in range(20):
        assert torch.equal(int4_experts(x, weights, ids, w13, w2), together)
    assert int4_experts(x[:0], weights[:0], ids[:0], w13, w2).shape == (0, shape[1])


@on_a_gpu
def test_rows_at_odd_addresses():
    shape = SMALL[1]
    (w13, w2), _ = random_experts(shape, torch.bfloat16)
    x, weights, ids = random_tokens(shape, 4, torch.bfloat16)
    expected = int4_experts(x, weights, ids, w13, w2)
    odd = torch.zeros(4, shape[1] + 3, dtype=x.dtype, device=DEVICE)[:, 1 : shape[1] + 1]
    assert torch.equal(int4_experts(odd.copy_(x), weights, ids, w13, w2), expected)


@on_a_gpu
def test_graphs_of_launches_in_a_row():
    """Layers follow one another in a CUDA graph, each reading what the last one wrote."""
    shape = LARGE[3]
    layers = [random_experts(shape[:4] + groups, torch.bfloat16)[0] for groups in ((64, 32), (128, 64), (32, 128))]
    x, weights, ids = random_tokens(shape, 5, torch.bfloat16)
    x = x.contiguous()

    def run():
        y = x
        for w13, w2 in layers * 3:
            first = int4_experts(y, weights, ids, w13, w2)  # two in a row: the second begins under the end of the first
            y = F.rms_norm(first + int4_experts(first, weights, ids, *layers[0]), shape[1:2])
        return y

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(5):
        fresh = random_tokens(shape, 5, torch.bfloat16)[0]
        x.copy_(fresh.roll(seed, 1))
        ids.copy_(ids.roll(1, 0))
        graph.replay()
        assert torch.equal(out, run()) and out.isfinite().all() and out.norm() > 0
