"""Puts n-gram drafts in the place of a model's, and makes their distributions what they are: a Triton kernel.

Such a draft was not drawn: its distribution is 1 at its token. The sampler reads logits, so they become 0 at the token, and
`LOW` elsewhere, which is 0 as a probability at any temperature that is used, and unlike an infinity leaves no 0 x inf.

`reference` computes the same in plain PyTorch.
"""

import torch

from vllm_quantspec.kernels.launch import check_device, jit, power_of_two, tl

LOW = -3e4  # a float16 has no less than -65504
BLOCK = 4096


def write_ngram_drafts(
    drafts: torch.Tensor,
    found: torch.Tensor | None,
    rows: torch.Tensor,
    slots: torch.Tensor,
    number: int,
    draft_tokens: torch.Tensor,
    draft_logits: torch.Tensor | None,
) -> None:
    """Write ``drafts`` over the first ``number`` drafts of their requests, and over the logits of those; in place.

    Args:
        drafts: int64 [F, at least number], the n-grams' token ids, contiguous.
        found: bool [F]; False leaves a request's drafts as they are. None: all are written.
        rows: int64 [F], of each its row of ``draft_tokens``; slots: int64 [F], its first index into ``draft_logits``. Each
            row and slot at most once.
        draft_tokens: int64 [R, at least number], contiguous rows.
        draft_logits: floating point [S, at least number, V], contiguous rows; None where drafts have no distributions.

    Raises:
        ValueError: if an argument does not fit the above.
        RuntimeError: where Triton is not installed.
    """
    _check(drafts, found, rows, slots, number, draft_tokens, draft_logits)
    check_device(drafts)
    if number == 0 or len(drafts) == 0:
        return
    vocabulary = 1 if draft_logits is None else draft_logits.shape[2]
    block = min(BLOCK, power_of_two(vocabulary))
    _write_ngram_drafts[(-(-vocabulary // block), number, len(drafts))](
        drafts,
        None if found is None else found.view(torch.uint8),
        rows,
        slots,
        draft_tokens,
        draft_logits,
        vocabulary,
        drafts.stride(0),
        draft_tokens.stride(0),
        0 if draft_logits is None else draft_logits.stride(0),
        0 if draft_logits is None else draft_logits.stride(1),
        LOGIT=LOW,
        BLOCK_SIZE=block,
    )


def reference(drafts, found, rows, slots, number, draft_tokens, draft_logits) -> None:
    """`write_ngram_drafts` in plain PyTorch."""
    _check(drafts, found, rows, slots, number, draft_tokens, draft_logits)
    for i in range(len(drafts)):
        if found is None or found[i]:
            draft_tokens[rows[i], :number] = drafts[i, :number]
            if draft_logits is not None:
                logits = draft_logits[slots[i], :number]
                logits.fill_(LOW).scatter_(1, drafts[i, :number, None], 0.0)


def _check(drafts, found, rows, slots, number, draft_tokens, draft_logits) -> None:
    if not (rows.shape == slots.shape == drafts.shape[:1]) or (found is not None and found.shape != rows.shape):
        raise ValueError(f"rows, slots and found must have an entry for each of the {len(drafts)} requests.")
    integers = {"drafts": drafts, "rows": rows, "slots": slots, "draft_tokens": draft_tokens}
    for name, x in integers.items():
        if x.dtype != torch.int64 or x.stride(-1) != 1:
            raise ValueError(f"{name} must be int64 with contiguous rows, got {x.dtype} with strides {x.stride()}.")
    if found is not None and found.dtype != torch.bool:
        raise ValueError(f"found must be bool, got {found.dtype}.")
    if draft_logits is not None and not (draft_logits.dim() == 3 and draft_logits.stride(2) == 1):
        raise ValueError(f"draft_logits must be [slots, drafts, vocabulary] with contiguous rows, got {draft_logits.shape}.")
    widths = [x.shape[1] for x in (drafts, draft_tokens, draft_logits) if x is not None]
    if not 0 <= number <= min(widths):
        raise ValueError(f"There is room for {min(widths)} drafts of a request, not for {number}.")


# Strides and sizes are a model's and an engine's; their divisibility must not make another variant.
@jit(do_not_specialize=["vocabulary", "drafts_stride", "tokens_stride"])
def _write_ngram_drafts(
    drafts,
    found,
    rows,
    slots,
    draft_tokens,
    draft_logits,
    vocabulary,
    drafts_stride,
    tokens_stride,
    slot_stride,
    position_stride,
    LOGIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    block, position, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    writes = 1 if found is None else tl.load(found + request).to(tl.int32)  # 0 writes nothing
    token = tl.load(drafts + request * drafts_stride + position)
    row = tl.load(rows + request)
    tl.store(draft_tokens + row * tokens_stride + position, token, mask=block < writes)
    if draft_logits is not None:
        slot = tl.load(slots + request)
        ids = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        logits = draft_logits + slot * slot_stride + position.to(tl.int64) * position_stride
        values = tl.where(ids == token, 0.0, LOGIT)
        tl.store(logits + ids, values.to(draft_logits.dtype.element_ty), mask=ids < vocabulary * writes)
