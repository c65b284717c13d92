"""The sizes of a decoder-only transformer, as a config.json has them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from vllm_quantspec.checkpoint import four_bits
from vllm_quantspec.supported import has_recurrent_layers, head_size_of, num_sliding_layers, text_part, unsupported

# Experts are chosen evenly, but tokens of one sequence choose alike: each token of a verification after the first counts as
# this much of a token.
EXPERT_TOKEN = 0.55
# Model types whose decoder layers `draft.joined_layers` knows.
JOINED_TYPES = ("llama", "mistral", "phi3", "qwen2", "qwen3")


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in some of a model's layers; weights are numbers of weights in one layer.

    active: experts that a token chooses, of ``number``.
    expert_weights: of one expert. Every token needs router_weights, of the router and a shared expert's gate, which stay in
    16 bits in a draft, and shared_weights, of shared experts.
    """

    num_layers: int
    number: int
    active: int
    expert_weights: int
    router_weights: int
    shared_weights: int

    @property
    def int4_weights(self) -> int:
        """Those of which the draft has a copy with ``draft_experts: int4``, in all layers."""
        return self.num_layers * (self.number * self.expert_weights + self.shared_weights)

    @property
    def weights(self) -> int:
        """All of them, in all layers."""
        return self.int4_weights + self.num_layers * self.router_weights

    def chosen(self, sequences: int, tokens: int = 1) -> float:
        """Different experts per layer that ``tokens`` tokens of each of ``sequences`` choose, on average."""
        effective = sequences * (1 + EXPERT_TOKEN * (tokens - 1))
        return self.number * (1 - (1 - self.active / self.number) ** effective)

    def int4_weights_read(self, sequences: int) -> float:
        """Weights that a draft step of so many sequences reads in 4 bits, in all layers."""
        return self.num_layers * (self.chosen(sequences) * self.expert_weights + self.shared_weights)

    def weights_read(self, sequences: int, tokens: int = 1) -> float:
        """Weights that a step of the target reads, in all layers."""
        every = self.shared_weights + self.router_weights
        return self.num_layers * (self.chosen(sequences, tokens) * self.expert_weights + every)


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder-only transformer; ``*_weights`` are numbers of weights.

    Of ``num_layers``, ``sliding_layers`` attend to the newest ``sliding_window`` tokens alone, in 16 bits.
    ``linear_weights`` are without experts. Of these and the head the draft has a copy in INT4, of the experts if asked for.
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    linear_weights: int
    head_weights: int
    embedding_weights: int
    vocab_size: int
    dtype: torch.dtype
    experts: Experts | None = None
    sliding_layers: int = 0
    sliding_window: int = 0
    linear_bits: float | None = None
    """Of a weight of linear layers in a 4-bit checkpoint, with its scale and zero point; None: as the dtype."""
    can_join_layers: bool = False
    """Whether a draft step of few sequences computes all between two attentions in one launch (`joined_layers`)."""

    @property
    def layers_in_pool(self) -> tuple[int, int]:
        """Full and sliding layers that vLLM's pool has room for: it splits them into groups of equally many layers."""
        full, sliding = self.num_layers - self.sliding_layers, self.sliding_layers
        if not sliding:
            return full, 0
        least, most = min(full, sliding), max(full, sliding)
        group = most if most < 1.5 * least else least
        return math.ceil(full / group) * group, math.ceil(sliding / group) * group

    @property
    def weights(self) -> int:
        experts = self.experts.weights if self.experts else 0
        return self.linear_weights + self.head_weights + self.embedding_weights + experts

    @property
    def weight_bytes(self) -> float:
        """Of all weights as loaded."""
        fewer = 0 if self.linear_bits is None else self.linear_weights * (self.dtype.itemsize - self.linear_bits / 8)
        return self.weights * self.dtype.itemsize - fewer

    def int4_weights(self, draft_experts: str) -> int:
        """Those of which the draft has a copy in INT4; ``draft_experts`` as of `QuantSpecOptions`."""
        experts = self.experts.int4_weights if self.experts and draft_experts == "int4" else 0
        return self.linear_weights + self.head_weights + experts


def read_config(path: str) -> dict:
    """A parsed config.json (a file, its folder, or a hub id).

    Raises:
        ValueError: one sentence, where there is no configuration.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if file.is_file():
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file ({error}).") from error
    elif file.exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ValueError(f"{path}: no config.json there; give a config.json, its folder, or a hub id such as owner/name.")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path).to_dict()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: its configuration cannot be loaded ({str(error).splitlines()[0]}).") from error


def model_from(config: dict, name: str) -> Model:
    """The sizes in a parsed configuration.

    Raises:
        ValueError: one sentence, for a model that the engine refuses, or whose configuration lacks a size.
    """
    refusal = unsupported(config, name)
    if refusal:
        raise ValueError(f"not supported; an engine would stop with this: {refusal}")
    text = text_part(config)
    if has_recurrent_layers(text):
        raise ValueError(f"{name} has Mamba or linear-attention layers, which estimates do not count; there is no estimate.")
    c = SimpleNamespace(**text)
    missing = [
        key
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if not isinstance(text.get(key), int)
    ]
    if missing:
        raise ValueError(
            f"{name}: the configuration has no {missing[0]}; estimates are for decoder-only transformers which name it."
        )
    experts = experts_of(text, name)
    num_dense = c.num_hidden_layers - (experts.num_layers if experts else 0)
    kv_heads = text.get("num_key_value_heads") or c.num_attention_heads
    if not isinstance(kv_heads, int):
        raise ValueError(f"{name}: its layers have different numbers of KV heads, which estimates do not count.")
    head_size = head_size_of(text)
    attention = c.hidden_size * head_size * (2 * c.num_attention_heads + 2 * kv_heads)
    mlp = 3 * c.hidden_size * c.intermediate_size
    vocabulary = c.vocab_size * c.hidden_size
    checkpoint = four_bits(config.get("quantization_config") or text.get("quantization_config"))
    dtype = getattr(torch, str(text.get("dtype") or text.get("torch_dtype") or "bfloat16"), torch.bfloat16)
    return Model(
        name,
        c.num_hidden_layers,
        c.num_attention_heads,
        kv_heads,
        head_size,
        c.num_hidden_layers * attention + num_dense * mlp,
        vocabulary,
        0 if text.get("tie_word_embeddings") else vocabulary,
        c.vocab_size,
        dtype if dtype.itemsize == 2 else torch.bfloat16,
        experts,
        num_sliding_layers(text),
        text.get("sliding_window") or 0,
        linear_bits := None if isinstance(checkpoint, str) else checkpoint.bits(c.hidden_size),
        text.get("model_type") in JOINED_TYPES
        and experts is None
        and (linear_bits is None or checkpoint.group_size == 128)  # others are not, with one copy
        and not any(n % 128 for n in (c.hidden_size, c.intermediate_size, c.num_attention_heads * head_size)),
    )


def experts_of(text: dict, name: str) -> Experts | None:
    """The mixture of experts that a language model's configuration describes; None for a dense model.

    Raises:
        ValueError: one sentence, for a description that lacks a size.
    """

    def first(*keys: str):
        return next((text[key] for key in keys if text.get(key)), None)

    number = first("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if not number:
        return None
    active = first("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token")
    width = first("moe_intermediate_size", "intermediate_size")
    if not all(isinstance(size, int) for size in (number, active, width)):
        what = "experts a token chooses" if not isinstance(active, int) else "width of an expert"
        raise ValueError(f"{name}: the configuration has experts, but not the {what}; there is no estimate.")
    hidden, layers = text["hidden_size"], range(text["num_hidden_layers"])
    dense, every = text.get("mlp_only_layers") or (), first("decoder_sparse_step", "moe_layer_freq") or 1
    from_layer = text.get("first_k_dense_replace") or 0
    if isinstance(every, list):  # of each layer, whether it has experts
        sparse = [i for i, has_experts in zip(layers, every, strict=False) if has_experts]
    else:
        sparse = [i for i in layers if i not in dense and (i + 1) % every == 0 and i >= from_layer]
    gated = text.get("shared_expert_intermediate_size") or 0  # Qwen 2: one shared expert, with a gate of its own
    shared = gated or width * (first("n_shared_experts", "num_shared_experts", "moe_num_shared_experts") or 0)
    router = hidden * (number + (1 if gated else 0))
    return Experts(len(sparse), number, active, 3 * hidden * width, router, 3 * hidden * shared)
