"""The largest logits of a draft's INT4 output layer, computed again with the target's weight: a Triton kernel.

Rounding the output layer to 4 bits moves logits by so much that fewer drafts are accepted; but of a vocabulary, a few logits
are all that matters. So the vocabulary is divided among `GROUPS` groups, `RUN` neighbours at a time (frequent tokens, which
are likely to be large together, have neighbouring ids), and in each group the two largest logits become exact.

`reference` computes the same in plain PyTorch.
"""

import torch
import torch.nn.functional as F

from vllm_quantspec.kernels.launch import check_device, jit, overlap, power_of_two, tl

GROUPS, RUN = 256, 16
# Found on an H200 (see benchmarks/NOTES.md): warps of a CTA, which is a group of one token, and channels of a row that it
# holds at a time.
WARPS = 8
MAX_CHANNELS = 2048


def rescore_logits(
    logits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Replace the two largest ``logits`` of each group by those of ``x weight^T + bias``, in fp32 sums, in place.

    Group ``g`` of ``n = min(GROUPS, ceil(V / RUN))`` has the ids whose ``id // RUN % n`` is ``g``; of equal logits that with
    the smaller id counts as larger. The result is ``logits``.

    Args:
        logits: floating point [M, V]; rows may be strided.
        x: [M, H] and weight: [V, H], bfloat16, float16 or float32; rows may be strided.
        bias: [V] or None.

    Raises:
        ValueError: if an argument does not fit the above.
        RuntimeError: where Triton is not installed.
    """
    _check(logits, x, weight, bias)
    check_device(logits)
    num_tokens, vocabulary = logits.shape
    if num_tokens == 0:
        return logits
    runs = -(-vocabulary // RUN)
    groups = min(GROUPS, runs)
    _rescore_logits[(groups, num_tokens)](
        logits,
        x,
        weight,
        bias,
        vocabulary,
        groups,
        logits.stride(0),
        x.stride(0),
        weight.stride(0),
        H=weight.shape[1],
        LANES=power_of_two(RUN * -(-runs // groups)),
        CHANNELS=min(MAX_CHANNELS, power_of_two(weight.shape[1])),
        IDS_PER_RUN=RUN,
        num_warps=WARPS,
        **overlap(logits),
    )
    return logits


def reference(logits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`rescore_logits` in plain PyTorch."""
    _check(logits, x, weight, bias)
    num_tokens, vocabulary = logits.shape
    groups = min(GROUPS, -(-vocabulary // RUN))
    ids = torch.arange(vocabulary, device=logits.device)
    ids = F.pad(ids, (0, -vocabulary % (RUN * groups)), value=-1).view(-1, groups, RUN).transpose(0, 1).flatten(1)
    grouped = logits[:, ids].float().masked_fill(ids < 0, -torch.inf)  # [M, groups, ids of a group]
    best = grouped.sort(dim=-1, descending=True, stable=True).indices[..., :2]
    best = ids.expand(num_tokens, -1, -1).gather(-1, best).flatten(1)  # [M, 2 * groups]
    exact = (weight[best].float() @ x.float().unsqueeze(-1)).squeeze(-1)
    if bias is not None:
        exact += bias[best].float()
    token, candidate = (best >= 0).nonzero(as_tuple=True)
    logits[token, best[token, candidate]] = exact[token, candidate].to(logits.dtype)
    return logits


def _check(logits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    for name, tensor in (("logits", logits), ("x", x), ("weight", weight)):
        if tensor.dim() != 2 or not tensor.dtype.is_floating_point or tensor.stride(1) != 1:
            raise ValueError(
                f"{name} must be a floating point matrix with contiguous rows, got {tensor.dtype} {list(tensor.shape)}."
            )
    if logits.shape != (x.shape[0], weight.shape[0]) or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"logits {list(logits.shape)} are not those of x {list(x.shape)} and a weight of {list(weight.shape)}."
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous [{weight.shape[0]}], got {list(bias.shape)}.")


@jit
def _id(lane, group, groups, IDS_PER_RUN: tl.constexpr):
    """The id in a lane of a group."""
    return (lane // IDS_PER_RUN * groups + group) * IDS_PER_RUN + lane % IDS_PER_RUN


# The vocabulary is that of a model; its divisibility must not make another variant.
@jit(do_not_specialize=["vocabulary", "groups"])
def _rescore_logits(
    logits,
    x,
    weight,
    bias,
    vocabulary,
    groups,
    logits_stride,
    x_stride,
    weight_stride,
    H: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
    IDS_PER_RUN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    group, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    logits += token * logits_stride
    x += token * x_stride
    lane = tl.arange(0, LANES)
    ids = _id(lane, group, groups, IDS_PER_RUN)
    values = tl.load(logits + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    values = tl.where(values != values, float("inf"), values)  # argmax of NaN may be any lane
    first = tl.argmax(values, 0)
    second = tl.argmax(tl.where(lane == first, float("-inf"), values), 0)
    first, second = _id(first, group, groups, IDS_PER_RUN), _id(second, group, groups, IDS_PER_RUN)
    # Whatever the logits are, never a row behind the weight's last.
    first, second = tl.minimum(first, vocabulary - 1), tl.minimum(second, vocabulary - 1)
    first_row, second_row = first.to(tl.int64) * weight_stride, second.to(tl.int64) * weight_stride
    first_sums = tl.zeros([CHANNELS], tl.float32)
    second_sums = tl.zeros([CHANNELS], tl.float32)
    for start in tl.static_range(0, H, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        mask = channel < H
        xs = tl.load(x + channel, mask=mask, other=0).to(tl.float32)
        first_sums += xs * tl.load(weight + first_row + channel, mask=mask, other=0).to(tl.float32)
        second_sums += xs * tl.load(weight + second_row + channel, mask=mask, other=0).to(tl.float32)
    first_logit, second_logit = tl.sum(first_sums, 0), tl.sum(second_sums, 0)
    if bias is not None:
        first_logit += tl.load(bias + first).to(tl.float32)
        second_logit += tl.load(bias + second).to(tl.float32)
    tl.store(logits + first, first_logit.to(logits.dtype.element_ty))
    tl.store(logits + second, second_logit.to(logits.dtype.element_ty))
