"""Sleep, wake-up and new weights on a GPU, under CUDA graphs: the draft has its INT4 weights where the graphs read them.

`test_weight_updates.py` checks `reload_weights` on a CPU, `test_draft_logits.py` drafts that are broken on either.
"""

import os
import subprocess
import sys

import pytest
import torch
from engine_tools import QUANTSPEC_CACHE, assert_same_or_tied, engine, generate, quantspec, speculation_counts
from test_draft_logits import break_draft
from test_models import ARCHITECTURES, ENGINE, LENGTHS, SIZES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

TIE = 0.125  # see test_lossless.py
TOKENS = 120


def run(llm, prompts) -> tuple[list, float]:
    """Greedy answers, and the share of first drafts that was accepted."""
    llm.reset_prefix_cache()
    before = speculation_counts(llm)
    answers = generate(llm, prompts, TOKENS)
    after = speculation_counts(llm)
    return answers, (after[1][0] - before[1][0]) / (after[0] - before[0])


OPTIONS = {
    "search": {"weight_rounding": "search"},
    "gptq": {},  # the default on a GPU
    "mixed": {"draft_weights": "mixed", "weight_bits": 6.0, "weight_rounding": "search"},
}


def sleep_and_wake_up(model: str, passage: str, method: str) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model).encode(passage)
    prompts = [tokens[37 * i : 37 * i + n] for i, n in enumerate((5, 130, 700, 3000))]
    with engine(model, enable_sleep_mode=True, **quantspec(4, **OPTIONS[method])) as llm:
        expected, share = run(llm, prompts)
        assert share > 0.6
        llm.sleep(level=1)
        llm.wake_up()
        answers, again = run(llm, prompts)
        assert_same_or_tied(expected, answers, TIE, "level 1")
        assert abs(again - share) < 0.02  # no other weights: those of GPTQ are not made again
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
        answers, again = run(llm, prompts)
        assert_same_or_tied(expected, answers, TIE, "level 2")
        assert abs(again - share) < (0.1 if method == "gptq" else 0.02)
        llm.sleep(level=2)
        llm.wake_up()
        llm.collective_rpc("reload_weights")
        answers, again = run(llm, prompts)
        assert_same_or_tied(expected, answers, TIE, "level 2 again")
        llm.collective_rpc("reload_weights")
        answers, again = run(llm, prompts)
        assert_same_or_tied(expected, answers, TIE, "reloaded")
        assert abs(again - share) < (0.1 if method == "gptq" else 0.02)
        # Lossless, and the draft is back after it was broken and the weights came in again.
        assert break_draft(llm, float("nan")) >= 21
        answers, again = run(llm, prompts)
        assert_same_or_tied(expected, answers, TIE, "broken")
        assert again < 0.1
        llm.collective_rpc("reload_weights")
        answers, again = run(llm, prompts)
        assert_same_or_tied(expected, answers, TIE, "reloaded after that")
        assert abs(again - share) < (0.1 if method == "gptq" else 0.02)


@pytest.mark.parametrize("method", OPTIONS)
def test_sleep(method):
    """In a process of its own: vLLM's sleeping allocator serves one engine per process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, __file__, method], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_broken_draft_of_a_mixture_of_experts(temperature, tmp_path):
    """Its router sees hidden states that are NaN, and must not name experts that do not exist."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **(SIZES | ARCHITECTURES["qwen3_moe"]))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    prompts = [torch.randint(3, 1000, (length,)).tolist() for length in LENGTHS]
    with engine(str(tmp_path), **ENGINE, **QUANTSPEC_CACHE) as llm:
        expected = generate(llm, prompts, 40)
    with engine(str(tmp_path), **ENGINE, **quantspec(3)) as llm:
        assert break_draft(llm, float("nan")) > 3
        answers = generate(llm, prompts, 40, temperature=temperature, seed=1)
        assert all(0 <= t < SIZES["vocab_size"] for a in answers for t in a.tokens)
        if temperature == 0:
            assert_same_or_tied(expected, answers, TIE)
        else:  # token 0 is what a NaN among probabilities used to give
            assert sum(t == 0 for a in answers for t in a.tokens) < 20


if __name__ == "__main__":
    from conftest import ASSETS

    sleep_and_wake_up(str(ASSETS / "books-4m"), (ASSETS / "passage.txt").read_text(encoding="utf-8"), sys.argv[1])
