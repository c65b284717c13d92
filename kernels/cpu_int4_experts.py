"""A mixture's experts in INT4 on any CPU: ``torch.ops.vllm_quantspec.cpu_int4_experts``.

Each expert that a token chose is two weights of `cpu_int4_linear`, which computes in float32; so does everything here, and
the sum over a token's experts is rounded once. Of the experts that no token chose nothing is read.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from vllm_quantspec.kernels.cpu_int4_linear import cpu_int4_linear

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def cpu_int4_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    activation: str,
) -> torch.Tensor:
    """Sum over a token's experts of ``weight * (activation(x gate^T) * (x up^T)) down^T``.

    Args:
        x: bfloat16, float16 or float32 [tokens, hidden].
        topk_weights, topk_ids: float and integer [tokens, experts per token]; ids are 0 .. experts - 1.
        w13: codes, scales and zeros of `cpu_int4_linear.pack`, each with a first dimension of experts; the outputs are
            those of the gate and then those of up.
        w2: likewise of down.
        activation: a key of ``ACTIVATIONS``.

    Returns:
        [tokens, hidden] in x's dtype.
    """
    inputs, act = x.float(), ACTIVATIONS[activation]
    out = torch.zeros_like(inputs)
    for expert in topk_ids.unique().tolist():
        rows, places = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = cpu_int4_linear(inputs[rows], *(part[expert] for part in w13)).chunk(2, dim=-1)
        down = cpu_int4_linear(act(gate) * up, *(part[expert] for part in w2))
        out.index_add_(0, rows, down * topk_weights[rows, places, None].float())
    return out.to(x.dtype)


def _fake(x, topk_weights, topk_ids, w13, w2, activation):
    return torch.empty_like(x)


# One operator, because torch.compile must not see which experts were chosen.
_library = torch.library.Library("vllm_quantspec", "FRAGMENT")
_library.define(
    "cpu_int4_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor[] w13, Tensor[] w2, str activation) -> Tensor"
)
_library.impl("cpu_int4_experts", cpu_int4_experts, "CPU")
torch.library.register_fake("vllm_quantspec::cpu_int4_experts", _fake, lib=_library)
