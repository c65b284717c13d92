"""The configurations that end_to_end.py names: the arguments of their engines, and how often their drafts are accepted."""

from common import QUANTSPEC

from vllm_quantspec.config import AUTO_NUMBERS
from vllm_quantspec.estimate import GIB

# Per token, of configurations other than QuantSpec's.
ACCEPTANCE = {
    # 3.4 tokens per step with 5 drafted: vLLM's ngram on books-30m's greedy text after 4k and 16k tokens of novels
    # (results/acceptance-books-30m-ngram.json). So small a model repeats itself when greedy; at temperature 0.7 it is 1.00.
    "ngram": 0.77,
    "draft": 0.8,  # assumed: that of a good small draft; books-30m has none of its vocabulary to measure one with
    "self": 1.0,
    # books-30m at 32k tokens and temperature 0.7, whose drafts read an eighth, a sixteenth of the old tokens; 0.938 in the
    # same run where they read all (results/sparse_acceptance-books-30m.json, 8 drafted: 6.57, 6.36 and 6.96 tokens).
    "sparse8": 0.919,
    "sparse16": 0.91,
    "auto": 0.91,  # where it is sparse
    "target16": 0.92,
}
# Of configurations that are QuantSpec with other options.
SPARSE = {
    "sparse8": {"draft_context": 1 / 8},
    "sparse16": {"draft_context": 1 / 16},
    "target16": {"draft_context": 1 / 16, "draft_weights": "target"},
    "auto": {"draft_context": "auto"},
}
# Bytes of a token against BF16's, with 8 KV heads of 128 or more of either.
CACHE_BYTES = {"bf16": 1.0, "marlin": 1.0, "fp8": 0.5, "cache-int4": 0.29, "int4": 0.29}
# vLLM's other caches of fewer than 8 bits, by their --kv-cache-dtype, and what they take at most, measures of `CACHE_BYTES`.
PEER_CACHES = {"int4_per_token_head": 0.3, "turboquant_4bit_nc": 0.3, "turboquant_k8v4": 0.42, "nvfp4": 0.3}
CACHE_BYTES |= PEER_CACHES
OUR_CACHE_BYTES = 0.54
# QuantSpec that chooses the number of drafts, and of that engine's rows, those for which one was held.
DRAFTS_AUTO, HELD = "drafts-auto", "held"


def drafted(config: str) -> int:
    """Tokens that a configuration drafts per verification."""
    last = config.rpartition("-")[2]
    return int(last) if last.isdigit() else 0


def numbers_of(config: str) -> tuple[int, ...]:
    """Numbers of drafts that a step of a configuration's engine may verify."""
    return AUTO_NUMBERS if config == DRAFTS_AUTO else (drafted(config),)


def drafter(config: str) -> str:
    """What a configuration drafts with: "" for QuantSpec or nothing, "int4" for QuantSpec on the cache in 4 bits."""
    return config.removeprefix("v1-").rpartition("-")[0] if drafted(config) else ""


def is_held(config: str) -> bool:
    """Whether a row is one of ``drafts-auto`` with a number of drafts held."""
    return config.startswith(f"{HELD}-")


def acceptance_of(config: str, acceptance: float) -> float:
    """Probability that a draft is accepted, given that those before it were; ``acceptance`` is QuantSpec's."""
    return ACCEPTANCE.get(drafter(config), acceptance)


def engine_arguments(config: str, acceptance: float, quantspec: dict, folders: dict[str, str]) -> dict:
    """LLM arguments of a configuration; ``folders`` has those of the models "self" and "draft"."""
    if config == "bf16":
        return {}
    if config == "marlin":
        return {"linear_backend": "marlin"}
    if config == "fp8" or config in PEER_CACHES:
        return {"kv_cache_dtype": config}
    if config == "cache":
        return {"attention_backend": "QUANTSPEC"}
    if config == "cache-int4":
        return {"kv_cache_dtype": "quantspec_int4"}
    gamma = drafted(config)
    methods = {
        **{name: {**QUANTSPEC, **quantspec, **options} for name, options in SPARSE.items()},
        "": {**QUANTSPEC, **quantspec},
        "int4": {**QUANTSPEC, **quantspec},
        "ngram": {"method": "ngram_gpu"},
        "draft": {"method": "draft_model", "model": folders["draft"]},
        "self": {"method": "draft_model", "model": folders["self"]},
    }
    if config == DRAFTS_AUTO:
        options = {**synthetic(config, acceptance), **QUANTSPEC, **quantspec, "num_speculative_tokens": "auto"}
        return {"speculative_config": options}
    options = {"num_speculative_tokens": gamma, **synthetic(config, acceptance), **methods[drafter(config)]}
    cache = {"kv_cache_dtype": "quantspec_int4"} if drafter(config) == "int4" else {}
    return {"speculative_config": options, **cache}


def one_copy(config: str, wanted: bool) -> dict:
    """LLM arguments of those configurations that read the hierarchical cache, to keep a 4-bit checkpoint's weights once."""
    others = config in ("bf16", "fp8", "marlin", *PEER_CACHES) or drafter(config) in ("ngram", "draft", "self")
    return {"additional_config": {"quantspec": {"one_copy": True}}} if wanted and not others else {}


def synthetic(config: str, acceptance: float) -> dict:
    """Speculative options that accept each draft with a probability, given that those before it were."""
    import torch

    if not torch.cuda.is_available():
        return {}
    each = acceptance_of(config, acceptance)
    rates = [each ** (i + 1) for i in range(max(numbers_of(config)))]
    return {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}


def cache_bytes(config: str, bf16_gib: float) -> int:
    """Bytes of a KV cache of as many tokens as BF16 has in ``bf16_gib``."""
    plain = drafter(config) in ("ngram", "draft", "self")
    return int(bf16_gib * GIB * CACHE_BYTES.get(drafter(config) or config, 1.0 if plain else OUR_CACHE_BYTES))
