"""What the target's linears see while the target writes: the second moments of their inputs, which GPTQ rounds by.

No data is asked for and no KV cache is needed: the model samples some short texts at temperature 1, each from a random first
token, before the engine's cache exists. Meanwhile its attention layers keep the keys and values of these few tokens in plain
tensors. Then all texts go through the model once more, and each linear is handed over with its moments as it is reached, so
that there is one matrix of moments at a time.

What that takes at most, `vllm_quantspec.memory.gptq_bytes` adds up: keys and values of all texts, ``2 * layers * TEXTS *
LENGTH * KV heads * head size`` numbers; and for the widest linear its inputs and four matrices of its moments in float32,
``4 * TEXTS * LENGTH * in + 16 * in^2`` bytes, with three times its weight in float32. The last pass has all ``TEXTS *
LENGTH`` tokens, also where the engine's own steps have fewer (``max_num_batched_tokens``): in parts, every linear's moments
would have to be kept from part to part. All is free again before vLLM measures what is left for the KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention

from vllm_quantspec.memory import LENGTH, TEXTS


def calibrate(
    vllm_config: VllmConfig,
    model: nn.Module,
    linears: Mapping[nn.Module, Callable[[torch.Tensor], None]],
    texts: int = TEXTS,
    length: int = LENGTH,
) -> torch.Tensor:
    """Call ``linears[linear]`` with the second moments of its inputs, float32 [in, in]: the mean of ``x x^T``.

    Args:
        model: the loaded target of this rank; tensor-parallel ranks take part together.
        linears: modules of ``model``; the callback of one that the texts never reach is not called. A callback may take its
            linear out of the mapping.
        texts, length: how many texts to sample, and their tokens.

    Returns:
        The texts, int32 [texts, length].
    """
    length = min(length, vllm_config.model_config.max_model_len)
    layers = {m.layer_name: m for m in model.modules() if isinstance(m, Attention)}
    like = next(model.parameters()).new_empty(0, dtype=vllm_config.model_config.dtype)
    owners = {name: layer.kv_sharing_target_layer_name or name for name, layer in layers.items()}
    caches = {owner: _Texts(layers[owner], like, texts, length) for owner in set(owners.values())}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for name, layer in layers.items():
            stack.enter_context(_attend_with(layer, caches[owners[name]]))
        ids = _sample(vllm_config, model, texts, length)
        for linear, take in linears.items():
            stack.enter_context(_call_once(linear, take))
        _forward(vllm_config, model, ids, 0)
    return ids


class _Texts:
    """Keys and values of one attention layer, [texts, heads, length, head size], and attention over them."""

    def __init__(self, layer: Attention, like: torch.Tensor, texts: int, length: int) -> None:
        # Not empty: what is masked is multiplied by zero, which a NaN would survive.
        self.keys, self.values = like.new_zeros(2, texts, layer.num_kv_heads, length, layer.head_size)
        self.filled = 0

    def __call__(self, layer: Attention, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None):
        """[texts * n, query heads * head size] for the next ``n`` tokens of each text, or for all of them again."""
        texts, _, length, size = self.keys.shape
        n = len(query) // texts
        query = query.reshape(texts, n, -1, size).transpose(1, 2)
        if key is not None:  # a layer that shares another's cache may have none
            self.filled = 0 if n == length else self.filled
            here = slice(self.filled, self.filled + n)
            self.keys[:, :, here] = key.reshape(texts, n, -1, size).transpose(1, 2)
            self.values[:, :, here] = value.reshape(texts, n, -1, size).transpose(1, 2)
            self.filled += n
        positions = torch.arange(length, device=query.device)
        mask = positions <= positions[self.filled - n : self.filled, None]
        output = F.scaled_dot_product_attention(
            query, self.keys, self.values, attn_mask=mask, scale=layer.impl.scale, enable_gqa=True
        )
        return output.transpose(1, 2).reshape(texts * n, -1)


@contextmanager
def _attend_with(layer: Attention, texts: _Texts) -> Iterator[None]:
    def forward(query, key, value, output_shape=None, output_dtype=None):
        return texts(layer, query, key, value).to(output_dtype or query.dtype)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


@contextmanager
def _call_once(linear: nn.Module, take: Callable[[torch.Tensor], None]) -> Iterator[None]:
    def hook(_, args):
        handle.remove()
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        take(x.t() @ x / len(x))

    handle = linear.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _forward(vllm_config: VllmConfig, model: nn.Module, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Hidden states of the tokens ``ids`` [texts, n] at positions from ``first`` on, without compiled code."""
    positions = torch.arange(first, first + ids.shape[1], device=ids.device).repeat(len(ids))
    with set_forward_context(None, vllm_config, num_tokens=ids.numel(), skip_compiled=True):
        return model(input_ids=ids.flatten(), positions=positions, inputs_embeds=None)


def _sample(vllm_config: VllmConfig, model: nn.Module, texts: int, length: int) -> torch.Tensor:
    """int32 [texts, length], the same on every rank."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(0)
    vocabulary = vllm_config.model_config.get_vocab_size()
    ids = torch.randint(vocabulary, (texts, length), device=device, dtype=torch.int32, generator=generator)
    group = get_tp_group()
    for at in range(length - 1):
        logits = model.compute_logits(_forward(vllm_config, model, ids[:, at : at + 1], at))
        token = torch.empty(texts, dtype=torch.int32, device=device)
        if logits is not None:  # only the first rank has them on some platforms
            token.copy_(logits.float().softmax(-1).multinomial(1, generator=generator).flatten())
        ids[:, at + 1] = group.broadcast(token) if group.world_size > 1 else token
    return ids
