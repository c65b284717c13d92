"""Memory that drafting takes: the formulas against tensors that are really made, and against the runner that makes them."""

import inspect

import torch

from vllm_quantspec import memory


def test_draft_logits():
    logits = torch.empty(7, 3, 1001, dtype=torch.bfloat16, device="meta")
    assert memory.draft_logits_bytes(7, 3, 1001) == logits.nbytes
    assert memory.draft_logits_bytes(7, 3, 1001, itemsize=4) == logits.float().nbytes
    assert 0.9 < memory.draft_logits_bytes(1024, 4, 128256) / 2**30 < 1.1  # Llama 3 at vLLM's default of 1,024 sequences


def test_the_runner_allocates_what_the_formula_says():
    """vLLM's own lines: a row of logits per request, draft and token, in the output layer's dtype."""
    from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

    source = "".join(inspect.getsource(DraftModelSpeculator.__init__).split())
    assert "(self.max_num_reqs,self.num_speculative_steps,self.vocab_size,),fill,dtype=dtype" in source
    assert "head_dtype" in inspect.getsource(DraftModelSpeculator.draft_logits_spec)


def test_gptq_is_a_matter_of_the_widest_linear():
    llama = dict(num_layers=32, num_heads=32, num_kv_heads=8, head_size=128, widest=14336, largest_weight=2 * 14336 * 4096)
    total = memory.gptq_bytes(**llama, tokens=8192)
    assert 8 < total / 2**30 < 10
    assert total > memory.MOMENTS + 16 * 14336**2
    assert memory.gptq_bytes(**llama | {"widest": 2 * 14336}, tokens=8192) > total + 3 * 16 * 14336**2
    assert memory.gptq_bytes(**llama, tokens=8192, texts=8, length=64) < total - 2**30
    # A forward pass counts where it takes more than a linear does, up to all tokens of the texts.
    many = memory.gptq_bytes(**llama | {"widest": 4096}, tokens=1 << 20)
    assert many == memory.gptq_bytes(**llama | {"widest": 4096}, tokens=memory.TEXTS * memory.LENGTH)
    assert many > memory.gptq_bytes(**llama | {"widest": 4096}, tokens=2048)


def test_the_engine_says_what_its_draft_logits_take(books_4m, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_quantspec.integration.draft import build

    lines = []
    monkeypatch.setattr(build.logger, "info", lambda message, *values: lines.append(message % values))
    options = {"method": "quantspec", "num_speculative_tokens": 3}
    for dtype, size in (("bfloat16", "0.02"), ("float32", "0.05")):
        options["draft_weights"] = "target" if dtype == "float32" else "int4"
        arguments = EngineArgs(
            model=books_4m, max_model_len=1024, max_num_seqs=1000, speculative_config=dict(options), dtype=dtype
        )
        build.log_draft_logits(arguments.create_engine_config())
        assert lines[-1].startswith(f"Draft logits: {size} GiB, for 3 drafts of 1000 sequences;")
