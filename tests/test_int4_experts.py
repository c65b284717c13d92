"""The kernel for the experts of a few tokens, against its reference; its layout, against what it was packed from."""

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, RUNS, run_in_the_interpreter, runs

from vllm_quantspec.kernels import int4_experts as module
from vllm_quantspec.kernels.int4_experts import dequantize, int4_experts, pack, reference
from vllm_quantspec.weights import quantize_weight

pytest.importorskip("triton")

# Experts, hidden size, width, experts per token, and the groups of both weights: groups that fill no tile, or several.
SHAPES = [(4, 128, 64, 2, 128, 64), (3, 256, 192, 1, 64, 32), (2, 640, 64, 2, 128, 32), (5, 64, 320, 3, 32, 64)]
if DEVICE == "cuda" and not INTERPRETED:
    SHAPES += [(128, 2048, 768, 8, 128, 128), (60, 2048, 1408, 4, 128, 128), (8, 4096, 14336, 2, 128, 128)]


@pytest.mark.skipif(RUNS, reason="the tests run in this process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


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
    number, hidden, _, chosen, *_ = shape
    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn(tokens, hidden + 8, generator=generator, device=device).to(dtype)[:, :hidden]
    weights, ids = torch.randn(tokens, number, generator=generator, device=device).softmax(-1).topk(chosen, dim=-1)
    return x, weights, ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[:5])
def test_packed_weights_read_back(shape, dtype):
    packed, plain = random_experts(shape, dtype)
    for one, weight in zip(packed, plain, strict=True):
        assert torch.equal(dequantize(one), weight)


def check(shape, dtype, activation="silu") -> None:
    (w13, w2), _ = random_experts(shape, dtype)
    for tokens in (2,) if INTERPRETED else (1, 2, 5, 8, 40):
        x, weights, ids = random_tokens(shape, tokens, dtype)
        expected = reference(x, weights, ids, w13, w2, activation)
        out = int4_experts(x, weights, ids.int() if tokens % 2 else ids, w13, w2, activation)
        error = (out.float() - expected.float()).norm() / expected.float().norm()
        assert out.dtype == dtype and error < (0.006 if dtype == torch.bfloat16 else 0.001), error


@runs
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_computes_what_the_reference_does(shape):
    check(shape, torch.bfloat16)


@runs
@pytest.mark.parametrize("activation", module.ACTIVATIONS)
@pytest.mark.parametrize(("parts", "channels"), [(2, 512), (8, 64)])
def test_other_activations_dtypes_and_tiles(activation, parts, channels, monkeypatch):
    monkeypatch.setattr(module, "PARTS", parts)
    monkeypatch.setattr(module, "CHANNELS", channels)
    check((3, 128, 64, 2, 64, 32), torch.float16, activation)


@runs
def test_a_token_is_the_same_among_others():
    shape = SHAPES[0]
    (w13, w2), _ = random_experts(shape, torch.bfloat16)
    x, weights, ids = random_tokens(shape, 3, torch.bfloat16)
    together = int4_experts(x, weights, ids, w13, w2)
    for i in range(0, 3, 2):
        assert torch.equal(int4_experts(x[i : i + 1], weights[i : i + 1], ids[i : i + 1], w13, w2)[0], together[i])
    assert int4_experts(x[:0], weights[:0], ids[:0], w13, w2).shape == (0, shape[1])


def test_what_does_not_fit_is_refused():
    shape = SHAPES[0]
    (w13, w2), _ = random_experts(shape, torch.bfloat16, "cpu")
    x, weights, ids = random_tokens(shape, 2, torch.bfloat16, "cpu")
    for arguments, what in (
        ((x.float(), weights, ids, w13, w2), "x must be torch.bfloat16"),
        ((x[:, :64], weights, ids, w13, w2), "are not those of x"),
        ((x, weights[:1], ids, w13, w2), "topk_weights"),
        ((x, weights, ids.to(torch.int16), w13, w2), "topk_ids must be int32"),
        ((x, weights, ids, w13, w2, "relu"), "activation must be one of"),
    ):
        with pytest.raises(ValueError, match=what):
            int4_experts(*arguments)
    with pytest.raises(ValueError, match="cannot be packed"):
        pack(*(torch.zeros(1, 40, n, dtype=torch.uint8) for n in (64, 2, 2)))
