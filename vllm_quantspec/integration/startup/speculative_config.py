"""QuantSpec's ``SpeculativeConfig``: to the rest of vLLM it is a draft model that needs no slots of its own."""

from __future__ import annotations

from typing import Any

from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.config.utils import config
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_quantspec.config import (
    AUTO_SCHEDULE,
    METHOD,
    NGRAM_SCHEDULE,
    QuantSpecOptions,
    draft_budget,
    named_options,
    parse_options,
)

logger = init_logger("vllm.quantspec.speculative_config")

# vLLM's ways to verify drafts after which the output is distributed as the model's own.
LOSSLESS = ("standard", "block")
# Accepts drafts at random, at a rate that the user chooses: to measure speed.
BENCHMARK = "synthetic"


@config
class QuantSpecConfig(SpeculativeConfig):
    """The options of ``QuantSpecOptions`` beside vLLM's own.

    The inherited ``method`` stays ``draft_model``: scheduler, runners, rejection sampler and metrics then treat the
    drafts as they treat those of any draft model.
    """

    group_size: int = 128
    draft_weights: str = "int4"
    draft_experts: str = "int4"
    draft_kv: str = "int4"
    weight_group_size: int = 128
    weight_rounding: str = "auto"
    weight_rotation: str = "none"
    weight_bits: float | None = None
    draft_activations: str = "model"
    quantize_lm_head: bool = True
    join_layers: bool = True
    fuse_layers: bool = False
    draft_context: str | int | float = "auto"
    draft_selection: str = "attention"
    ngram: str = "off"
    wide_share: float = 0.0  # of the draft's weights, those in 8 bits; where bits are chosen, known when the draft is built
    chooses_number: bool = False  # of drafts in each step; num_speculative_tokens are the most then
    asked_for: tuple[str, ...] = ()  # options that the user named: the others' defaults give way

    def __post_init__(self):
        # The draft is the target itself: the parent would read a draft model's configuration from disk here.
        self.method = "draft_model"
        self.model = self.target_model_config.model
        self.draft_model_config = self.target_model_config
        self.draft_parallel_config = self.target_parallel_config
        self.draft_tensor_parallel_size = self.target_parallel_config.tensor_parallel_size
        self.wide_share = float(self.draft_weights == "int8")
        return self

    @property
    def weighs_sparse_drafts(self) -> bool:
        """Whether a request's drafts read everything where its sparse ones are accepted too rarely: SnapKV's are kept.

        And none of an engine has sparse drafts whose longest request is too short for them.
        """
        if self.draft_context != "auto" or self.draft_selection == "snapkv":
            return False
        longest = self.target_model_config.max_model_len // self.group_size - 1
        return longest >= draft_budget("auto", self.group_size).min_scored_pages

    @property
    def max_num_new_slots_for_drafting(self) -> int:
        """The draft's first step has one query token per request: no slot beside the verified tokens' own."""
        return 0

    def use_ngram(self) -> bool:
        """Whether vLLM's GPU runner keeps the token ids of all requests on the device, where n-grams are looked for."""
        return self.ngram == "auto"

    def compute_hash(self) -> str:
        # Nothing of the draft changes the target's graph; the draft is compiled under a tag of its own.
        return (
            f"{METHOD}-{self.draft_weights}-{self.weight_bits}-{self.draft_experts}-{self.weight_group_size}-{self.weight_rotation}-"
            f"{self.draft_activations}-{self.quantize_lm_head}"
        )

    def __repr__(self) -> str:
        weights = self.draft_weights
        if "draft_weights" not in self.asked_for and self.weight_rounding == "auto" and not current_platform.is_cpu():
            weights += ", auto if rounded by GPTQ"  # which is settled when the model is loaded (`draft.build`)
        return (
            f"SpeculativeConfig(method='{METHOD}', num_spec_tokens={'up to ' * self.chooses_number}"
            f"{self.num_speculative_tokens}, group_size={self.group_size}, draft_weights='{weights}', "
            f"draft_experts='{self.draft_experts}', draft_kv='{self.draft_kv}', draft_context={self.draft_context!r}, "
            f"ngram='{self.ngram}')"
        )


def make_config(
    speculative_config: str | dict[str, Any], model_config: ModelConfig, parallel_config: ParallelConfig
) -> QuantSpecConfig:
    """Validate the user's options and build the configuration.

    Raises:
        ValueError: one sentence that names the option, what is wrong and what would be right.
    """
    options, vllm_options = parse_options(speculative_config)
    check_lossless(vllm_options.get("rejection_sample_method", LOSSLESS[0]))
    # Sampled drafts are accepted far more often than the draft's argmax once temperature > 0, and are the same at 0.
    vllm_options.setdefault("draft_sample_method", "probabilistic")
    if options.chooses_number:
        # vLLM then captures graphs for every number, and pads no request to the most that it could have.
        schedule = NGRAM_SCHEDULE if options.ngram == "auto" else AUTO_SCHEDULE
        vllm_options["num_speculative_tokens_per_batch_size"] = schedule
    ours = {name: getattr(options, name) for name in QuantSpecOptions.__dataclass_fields__}
    ours["num_speculative_tokens"] = options.most_drafts
    if options.ngram == "off":
        ours["prompt_lookup_min"] = ours["prompt_lookup_max"] = None
    return QuantSpecConfig(
        target_model_config=model_config,
        target_parallel_config=parallel_config,
        chooses_number=options.chooses_number,
        asked_for=named_options(speculative_config),
        **ours,
        **vllm_options,
    )


def check_lossless(rejection_sample_method: str) -> None:
    """Raises ValueError for a verification that changes what the model writes, or may: vLLM adds such methods."""
    if rejection_sample_method == BENCHMARK:
        logger.warning(
            "rejection_sample_method '%s' accepts drafts at random: the output is not the model's, only its speed counts",
            BENCHMARK,
        )
    elif rejection_sample_method not in LOSSLESS:
        raise ValueError(
            f"quantspec: rejection_sample_method {rejection_sample_method!r} is not known to keep the model's own output, "
            f"which QuantSpec promises; drop it, or set it to {' or '.join(map(repr, LOSSLESS))}."
        )
