"""What a model needs with and without QuantSpec, and what it gains: arithmetic on a model's config.json.

Memory is counted (`gpu_memory`), speed is modelled (`cost_model`), and `report` says both in words. What the engine would
refuse is refused here first, with the engine's sentence.
"""

from vllm_quantspec.estimate.cost_model import Speed, expected_tokens, speed
from vllm_quantspec.estimate.draft_weights import share_in_8_bits
from vllm_quantspec.estimate.gpu_memory import GIB, memory
from vllm_quantspec.estimate.sizes import Model, model_from
from vllm_quantspec.estimate.sparse_drafts import cycle_bytes

__all__ = [
    "GIB",
    "Model",
    "Speed",
    "cycle_bytes",
    "expected_tokens",
    "memory",
    "model_from",
    "share_in_8_bits",
    "speed",
]
