"""The draft's weights out of vLLM's quantized linears on a GPU: what the linear applies, not what its rounding of inputs
makes of a one."""

import pytest
import torch
from linear_tools import KINDS, build, one_rank

from vllm_quantspec.integration.draft.loaded import effective_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module", autouse=True)
def layers():
    with one_rank():
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1 / 9.4, 1 / 117.3, 0.37, 3.1e-4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_that_a_linear_applies(kind, scale, dtype):
    generator = torch.Generator(device="cuda").manual_seed(1)
    weight = torch.randn(512, 384, generator=generator, device="cuda") * 0.05
    zero_point = 77 if "asymmetric" in kind else 0
    try:
        layer, expected = build(kind, weight, scale, dtype, zero_point)
    except (ValueError, NotImplementedError) as error:
        pytest.skip(f"vLLM has no kernel for it here: {error}")
    applied, _ = effective_weight(layer, dtype)
    error = ((applied.float() - expected).norm() / expected.norm()).item()
    print(f"{kind}, {type(layer.quant_method).__name__}, scale {scale:.2g}, {dtype}: {error:.2g}")
    assert error < 5e-3
