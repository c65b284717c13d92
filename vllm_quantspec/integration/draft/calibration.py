"""What the target's linears see while the target writes: the second moments of their inputs, which GPTQ rounds by.

No data is asked for and no KV cache is needed: the model samples some short texts at temperature 1, each from a random first
token, before the engine's cache exists. Meanwhile its attention layers keep the keys and values of these few tokens in
plain tensors. Then all texts go through the model again, a few at a time so that no forward pass has more tokens than a
step of the engine may have (``max_num_batched_tokens``), and no further than they have to, while moments are added up of as
many linears as fit into `MOMENTS` bytes; once more for the next linears, until all have had theirs.

What that takes at most, `vllm_quantspec.memory.gptq_bytes` adds up. All is free again before vLLM measures what is left for
the KV cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from vllm_quantspec.integration.draft.rotary import make_rotary_positions
from vllm_quantspec.memory import LENGTH, MOMENTS, TEXTS

logger = init_logger("vllm.quantspec.calibration")

# Seconds between two lines of the log.
_PROGRESS = 10.0


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
        texts, length: how many texts to sample (fewer, where a step of the engine has fewer tokens), and their tokens.

    Returns:
        The texts, int32 [texts, length].
    """
    with Texts(vllm_config, model, texts, length, "GPTQ") as written:
        total, done = len(linears), 0
        for group in _within(MOMENTS, list(linears)):
            for linear, moments in _moments(written, group):
                linears[linear](moments)
                done += 1
                written.progress("GPTQ: rounded %d of %d linears", done, total)
    return written.ids


class Enough(Exception):
    """Raised within a forward pass: what is left of the model need not be computed."""


class Texts:
    """Texts that the model has written, and their way through it again; used in a ``with``, after which it is as before.

    Args:
        texts, length: how many to sample (fewer, where a step of the engine has fewer tokens), and their tokens.
        purpose: what the log says they are for.

    Attributes:
        ids: int32 [texts, length]. progress: a line for the log, now and then.
    """

    ids: torch.Tensor

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, texts: int, length: int, purpose: str) -> None:
        self.vllm_config, self.model, self.purpose, self.progress = vllm_config, model, purpose, _Progress()
        self.length = min(length, vllm_config.model_config.max_model_len)
        self.most = vllm_config.scheduler_config.max_num_batched_tokens
        self.texts = min(texts, self.most)
        self.stack = ExitStack()

    def __enter__(self) -> Texts:
        layers = {m.layer_name: m for m in self.model.modules() if isinstance(m, Attention)}
        like = next(self.model.parameters()).new_empty(0, dtype=self.vllm_config.model_config.dtype)
        owners = {name: layer.kv_sharing_target_layer_name or name for name, layer in layers.items()}
        caches = {owner: _Cache(layers[owner], like, self.texts, self.length) for owner in set(owners.values())}
        self.run = _Forward(self.vllm_config, self.model, caches.values())
        with self.stack as stack:
            stack.enter_context(torch.no_grad())
            for name, layer in layers.items():
                stack.enter_context(_attend_with(layer, caches[owners[name]]))
            self.ids = self._sample()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def forward(self) -> Iterator[torch.Tensor | None]:
        """Hidden states of all texts, [tokens, hidden size] at a time: no more tokens than a step of the engine may have.

        None where a hook in the model has raised `Enough`.
        """
        texts, length = self.ids.shape
        rows = max(1, self.most // length)
        for row in range(0, texts, rows):
            for first in range(0, length, self.most):
                try:
                    hidden = self.run(self.ids[row : row + rows, first : first + self.most], row, first)
                except Enough:
                    hidden = None
                yield hidden

    def _sample(self) -> torch.Tensor:
        """int32 [texts, length], the same on every rank."""
        device = next(self.model.parameters()).device
        generator = torch.Generator(device=device).manual_seed(0)
        vocabulary = self.vllm_config.model_config.get_vocab_size()
        ids = torch.randint(vocabulary, (self.texts, self.length), device=device, dtype=torch.int32, generator=generator)
        group = get_tp_group()
        for at in range(self.length - 1):
            logits = self.model.compute_logits(self.run(ids[:, at : at + 1], 0, at))
            token = torch.empty(self.texts, dtype=torch.int32, device=device)
            if logits is not None:  # only the first rank has them on some platforms
                token.copy_(logits.float().softmax(-1).multinomial(1, generator=generator).flatten())
            ids[:, at + 1] = group.broadcast(token) if group.world_size > 1 else token
            self.progress(self.purpose + ": the model has written %d of %d tokens of each text", at + 2, self.length)
        return ids


class _Progress:
    """Lines in the log, not more often than every few seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, message: str, *values: int) -> None:
        now = time.monotonic()
        if now - self.last >= _PROGRESS:
            self.last = now
            logger.info(message, *values)


class _Cache:
    """Keys and values of one attention layer, [texts, heads, length, head size], and attention over them."""

    def __init__(self, layer: Attention, like: torch.Tensor, texts: int, length: int) -> None:
        # Not empty: what is masked is multiplied by zero, which a NaN would survive.
        self.keys, self.values = like.new_zeros(2, texts, layer.num_kv_heads, length, layer.head_size)
        self.rows, self.here = slice(0, texts), slice(0, 0)

    def __call__(self, layer: Attention, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None):
        """[rows * n, query heads * head size] for the ``n`` tokens ``here`` of each of the texts ``rows``."""
        keys, values, here = self.keys[self.rows], self.values[self.rows], self.here
        texts, _, _, size = keys.shape
        n = len(query) // texts
        query = query.reshape(texts, n, -1, size).transpose(1, 2)
        if key is not None:  # a layer that shares another's cache may have none
            keys[:, :, here] = key.reshape(texts, n, -1, size).transpose(1, 2)
            values[:, :, here] = value.reshape(texts, n, -1, size).transpose(1, 2)
        positions = torch.arange(here.stop, device=query.device)
        mask = positions <= positions[here, None]
        output = F.scaled_dot_product_attention(
            query,
            keys[:, :, : here.stop],
            values[:, :, : here.stop],
            attn_mask=mask,
            scale=layer.impl.scale,
            enable_gqa=True,
        )
        return output.transpose(1, 2).reshape(texts * n, -1)


@contextmanager
def _attend_with(layer: Attention, cache: _Cache) -> Iterator[None]:
    def forward(query, key, value, output_shape=None, output_dtype=None):
        return cache(layer, query, key, value).to(output_dtype or query.dtype)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


class _Forward:
    """Hidden states of tokens ``ids`` [rows, n] of the texts from ``row`` on, at positions from ``first`` on.

    Without compiled code: it is compiled for the engine's own steps.
    """

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, caches) -> None:
        self.vllm_config, self.model, self.caches = vllm_config, model, list(caches)
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self.rotary = make_rotary_positions(vllm_config.model_config, most, next(model.parameters()).device)

    def __call__(self, ids: torch.Tensor, row: int, first: int) -> torch.Tensor:
        for cache in self.caches:
            cache.rows, cache.here = slice(row, row + len(ids)), slice(first, first + ids.shape[1])
        positions = torch.arange(first, first + ids.shape[1], device=ids.device).repeat(len(ids))
        if self.rotary is not None:
            positions = self.rotary(positions)
        with set_forward_context(None, self.vllm_config, num_tokens=ids.numel(), skip_compiled=True):
            # A column of ids is not contiguous, as vLLM's embedding with tensor parallelism wants them.
            return self.model(input_ids=ids.flatten().contiguous(), positions=positions, inputs_embeds=None)


def _within(budget: int, linears: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Runs of linears whose moments take at most ``budget`` bytes, or of a single one."""
    group, size = [], 0
    for linear in linears:
        needs = 4 * _num_inputs(linear) ** 2
        if group and size + needs > budget:
            yield group
            group, size = [], 0
        group.append(linear)
        size += needs
    if group:
        yield group


def _num_inputs(linear: nn.Module) -> int:
    """Input channels of this rank's shard; an output layer says it by another name."""
    names = ("input_size_per_partition", "input_size", "embedding_dim")
    return next(getattr(linear, name) for name in names if hasattr(linear, name))


def _moments(texts: Texts, linears: list[nn.Module]) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """Each of ``linears`` that the texts reach, with its moments."""
    sums: dict[nn.Module, torch.Tensor] = {}
    seen = dict.fromkeys(linears, 0)
    reached: set[nn.Module] = set()

    def add(linear: nn.Module, args: tuple) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        if linear in sums:
            sums[linear] += _products(x)
        else:
            sums[linear] = _products(x)
        seen[linear] += len(x)
        reached.add(linear)
        if len(reached) == len(linears):
            raise Enough

    handles = [linear.register_forward_pre_hook(add) for linear in linears]
    try:
        for _ in texts.forward():
            reached.clear()
    finally:
        for handle in handles:
            handle.remove()
    if sums and next(iter(sums.values())).is_cuda:
        torch.cuda.synchronize()  # a mixture's shared experts may run on a stream of their own
    for linear in linears:
        if linear in sums:
            yield linear, sums.pop(linear).div_(seen[linear])


def _products(x: torch.Tensor) -> torch.Tensor:
    """``x^T x`` in float32. Products of 16-bit numbers are exact in a tensor core, which adds them up in float32."""
    if x.is_cuda and x.dtype.itemsize == 2:
        return torch.mm(x.t(), x, out_dtype=torch.float32)
    x = x.float()
    return x.t() @ x
