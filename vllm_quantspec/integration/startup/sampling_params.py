"""``min_p`` and ``logit_bias`` under speculation.

vLLM refuses both beside any speculation. Its model runner V2 applies them to every row of logits, drafts' rows included, so
verification against the logits that it leaves is exact; on the CPU engine `integration/cpu/logits_processors.py` does the
same. Drafts know neither: the further these change the target's choice, the fewer are accepted.
"""

from __future__ import annotations

from vllm.sampling_params import SamplingParams

from vllm_quantspec.integration.startup.replace import replace


def _for_other_drafts(validate_spec_decode):
    def validate_spec_decode_of_others(self, speculative_config):
        from vllm_quantspec.integration.startup.speculative_config import QuantSpecConfig

        if not isinstance(speculative_config, QuantSpecConfig):
            validate_spec_decode(self, speculative_config)

    return validate_spec_decode_of_others


def install() -> None:
    """Replace the method."""
    replace(SamplingParams, "_validate_spec_decode", _for_other_drafts)
