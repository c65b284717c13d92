"""The engine on a GPU: CUDA graphs, torch.compile and async scheduling on. The rules that the CPU tests check in depth,
checked again where the kernels, the model runner and the speculator are other ones."""

import random
from collections import Counter

import pytest
import torch
from conftest import shared_path
from engine_tools import (
    QUANTSPEC_CACHE,
    RULE_3,
    SCHEDULE,
    Answer,
    assert_close,
    assert_drafts_by_schedule,
    assert_same_or_tied,
    draft_of,
    engine,
    generate,
    quantspec,
    speculation_counts,
)
from test_sampling import ALPHA, SEEDS, draw, statistics
from vllm import SamplingParams

from vllm_quantspec import sparse_policy
from vllm_quantspec.config import AUTO_NUMBERS, NGRAM_NUMBERS
from vllm_quantspec.draft_length import DraftLength, Drafts, Plan
from vllm_quantspec.integration.draft.joined_layers import MAX_ROWS
from vllm_quantspec.integration.gpu.step_graphs import PlainGraphs
from vllm_quantspec.kernels import cache_update, draft_layer, gather_context
from vllm_quantspec.sparse_choice import SparseChoice

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

G = 128
LENGTHS = [1, 5, G - 1, G, G + 1, 2 * G - 1, 2 * G, 3 * G - 3, 1000, 3000]
MAX_TOKENS = 150
SIZE = {"max_model_len": 20000, "max_num_seqs": 16, "enable_prefix_caching": False}
TIE = 0.125  # one rounding step of bfloat16 logits of about 16, as in test_lossless.py
MODELS = ["books_4m", "books_30m"]  # head size 64 and 128


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def prompts(model, passage) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model).encode(passage)
    long = tokens + tokens[4000:] + tokens
    return [tokens[37 * i : 37 * i + n] for i, n in enumerate(LENGTHS)] + [long[500 : 500 + 12000]]


def compiled_variants() -> int:
    """How many variants of the Triton kernels this process has compiled; vLLM complains of those after its warm-up."""
    kernels = (cache_update._store, cache_update._quantize, gather_context._gather)
    return sum(len(cached[0]) for kernel in kernels for cached in kernel.device_caches.values())


@pytest.fixture(scope="module")
def expected(model, prompts) -> list[Answer]:
    """The cache with speculation off; and the same engine is itself on another batch, up to ties."""
    with engine(model, **SIZE, **QUANTSPEC_CACHE) as llm:
        variants = compiled_variants()
        answers = generate(llm, prompts, MAX_TOKENS)
        assert compiled_variants() == variants > 0
        alone = [generate(llm, [p], MAX_TOKENS)[0] for p in prompts[-3:]]
        assert_same_or_tied(answers[-3:], alone, TIE, "alone, off")
    return answers


@pytest.fixture(scope="module")
def llm(model, expected):
    with engine(model, **(SIZE | {"enable_prefix_caching": True}), **quantspec(4)) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        yield llm


def speculator_of(llm):
    found = []
    llm.collective_rpc(lambda worker: found.append(worker.model_runner.speculator))
    return found[0]


def test_the_draft_loop_is_captured(llm):
    speculator = speculator_of(llm)
    assert speculator.supports_decode_metadata_update
    assert speculator.decode_cudagraph_manager.graphs


def test_lossless(llm, prompts, expected):
    before = speculation_counts(llm)
    answers = generate(llm, prompts, MAX_TOKENS)
    after = speculation_counts(llm)
    assert_same_or_tied(expected, answers, TIE, "batch")
    alone = [generate(llm, [p], MAX_TOKENS)[0] for p in prompts[-3:]]
    assert_close(expected[-3:], alone)  # these were prefix-cache hits
    assert after[1][0] - before[1][0] > 0.6 * (after[0] - before[0])


@pytest.mark.parametrize("together", [1, 2, 3])
def test_drafts_of_few_sequences_are_joined_launches(llm, prompts, expected, together):
    """One launch per layer, in a graph: the same answers, and drafts that are believed as often."""
    joined = draft_of(llm).joined
    if torch.cuda.get_device_capability() < draft_layer.MIN_CAPABILITY:
        assert joined is None
        return
    assert joined.max_rows == MAX_ROWS
    before = speculation_counts(llm)
    llm.reset_prefix_cache()
    assert_same_or_tied(expected[-together:], generate(llm, prompts[-together:], MAX_TOKENS), TIE, "joined")
    after = speculation_counts(llm)
    assert after[1][0] - before[1][0] > 0.6 * (after[0] - before[0])


def test_lossless_with_a_draft_that_is_often_wrong(llm, prompts, expected, monkeypatch):
    """Rejections of every kind: a random token in a random position of most drafts."""
    speculator = speculator_of(llm)
    propose = type(speculator).propose
    generator = torch.Generator(device="cuda").manual_seed(0)

    def propose_with_errors(*args, **kwargs):
        drafts = propose(speculator, *args, **kwargs)
        wrong = torch.randint(100, 4000, drafts.shape, generator=generator, device="cuda")
        drafts.copy_(torch.where(torch.rand(drafts.shape, generator=generator, device="cuda") < 0.2, wrong, drafts))
        return drafts

    monkeypatch.setattr(speculator, "propose", propose_with_errors)
    llm.reset_prefix_cache()
    before = speculation_counts(llm)
    answers = generate(llm, prompts, MAX_TOKENS)
    after = speculation_counts(llm)
    assert_same_or_tied(expected, answers, TIE, "wrong drafts")
    drafts, accepted = after[0] - before[0], [b - a for a, b in zip(before[1], after[1], strict=True)]
    assert 0.1 * drafts < accepted[-1] < 0.8 * drafts


def test_prefix_caching(llm, prompts):
    """Of a prompt, of an answer that drafts helped to write, and of a request that is gone already."""
    llm.reset_prefix_cache()
    prompt = prompts[-2][: 3 * G - 4]
    (first,) = generate(llm, [prompt], 2 * G + 30)
    longer = prompt + first.tokens
    (cached,) = generate(llm, [longer], 24)
    assert cached.num_cached_tokens >= 4 * G
    llm.reset_prefix_cache()
    (fresh,) = generate(llm, [longer], 24)
    assert fresh.num_cached_tokens == 0
    assert_close([fresh], [cached])
    for answer_tokens in range(1, 8):
        llm.reset_prefix_cache()
        (first,) = generate(llm, [prompt], answer_tokens)
        longer = prompt + first.tokens + prompts[-1][:20]
        (cached,) = generate(llm, [longer], 16)
        llm.reset_prefix_cache()
        (fresh,) = generate(llm, [longer], 16)
        assert cached.num_cached_tokens in (2 * G, 3 * G)
        assert_close([fresh], [cached])


def test_prefix_shared_within_a_step(llm, prompts):
    """Requests that come together: one computes pages, and the others read them in the very step that completes them."""
    shared = [prompts[-1][: 8 * G] + prompts[-2][20 * i : 20 * i + n] for i, n in enumerate((1, 3, 5, 40, 200))]
    llm.reset_prefix_cache()
    together = generate(llm, shared, 24)
    assert [a.num_cached_tokens for a in together] == [0] + 4 * [8 * G]
    fresh = []
    for prompt in shared:
        llm.reset_prefix_cache()
        fresh += generate(llm, [prompt], 24)
    assert_close(fresh, together)


def test_no_drafts_in_the_middle_of_a_prompt(llm, prompts, monkeypatch):
    speculator, loops = speculator_of(llm), []
    draft = speculator._fused_multi_step_decode
    monkeypatch.setattr(speculator, "_fused_multi_step_decode", lambda *args: loops.append(1) or draft(*args))
    config = llm.llm_engine.vllm_config
    long = (prompts[-1] * 2)[: config.model_config.max_model_len - 20]
    assert len(long) > config.scheduler_config.max_num_batched_tokens
    counts = []
    for prompt in (prompts[-1][:100], long):
        llm.reset_prefix_cache()
        generate(llm, [prompt], 1)
        counts.append(len(loops))
    assert counts[1] == 2 * counts[0]


def test_sampling_with_a_seed_repeats(llm, prompts):
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=60, ignore_eos=True)
    prompt = {"prompt_token_ids": prompts[-2][:700]}
    runs = [llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids for _ in range(3)]
    assert runs[1] == runs[2]  # the first filled the prefix cache, and had no hit itself
    assert all(0 <= t < llm.llm_engine.model_config.get_vocab_size() for t in runs[0])


def test_up_to_the_models_length(llm, prompts):
    limit = llm.llm_engine.model_config.max_model_len
    long = (prompts[-1] * 2)[:limit]
    answers = generate(llm, [long[: limit - 9], long[40:], prompts[-1][:30]], [100, 100, 20])
    assert [len(a.tokens) for a in answers] == [9, 40, 20]


@pytest.mark.parametrize(("gamma", "group_size"), [(1, 128), (8, 64)])
def test_other_lengths_of_draft(model, prompts, expected, gamma, group_size):
    if group_size != G:
        with engine(model, block_size=group_size, **SIZE, **QUANTSPEC_CACHE) as llm:
            expected = generate(llm, prompts, MAX_TOKENS)
    with engine(model, **SIZE, **quantspec(gamma, group_size=group_size)) as llm:
        assert_same_or_tied(expected, generate(llm, prompts, MAX_TOKENS), TIE, f"γ={gamma}")


def test_weights_rounded_by_gptq(model, prompts, expected):
    with engine(model, **SIZE, **quantspec(4, weight_rounding="gptq")) as llm:
        assert_same_or_tied(expected, generate(llm, prompts, MAX_TOKENS), TIE, "GPTQ")
        drafts, accepted = speculation_counts(llm)
    assert accepted[0] > 0.6 * drafts


@pytest.mark.parametrize(
    "options",
    [
        {"draft_weights": "int8"},
        {"draft_weights": "mixed", "weight_bits": 6.0, "weight_rotation": "hadamard"},
        {"draft_weights": "mixed", "weight_bits": 6.0, "weight_rounding": "gptq", "weight_rotation": "hadamard"},
        {"draft_weights": "auto"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_weights_in_8_bits(model, prompts, expected, options):
    with engine(model, **SIZE, **quantspec(4, **options)) as llm:
        assert_same_or_tied(expected, generate(llm, prompts, MAX_TOKENS), TIE, str(options))
        drafts, accepted = speculation_counts(llm)
    assert accepted[0] > 0.65 * drafts


def test_inputs_in_fp8(model, prompts, expected):
    """More than 8 sequences are drafted for at once: their linears round inputs."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    assert len(prompts) > 8
    with engine(model, **SIZE, **quantspec(4, draft_activations="fp8")) as llm:
        assert_same_or_tied(expected, generate(llm, prompts, MAX_TOKENS), TIE, "FP8 inputs")
        drafts, accepted = speculation_counts(llm)
    assert accepted[0] > 0.6 * drafts


def test_fewer_drafts_for_larger_batches(model, prompts, expected):
    with engine(model, **SIZE, **quantspec(4, num_speculative_tokens_per_batch_size=SCHEDULE)) as llm:
        assert_drafts_by_schedule(llm, prompts, expected, MAX_TOKENS, TIE)


@pytest.mark.parametrize("options", [{"num_speculative_tokens_per_batch_size": [[1, 2, 4], [3, 16, 1]]}, {}])
def test_one_draft_per_step_replays_a_graph(books_4m, passage, options, monkeypatch):
    """Whether 1 is an entry of a schedule or the engine's only number."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(books_4m).encode(passage)
    with engine(books_4m, **SIZE, **quantspec(4 if options else 1, **options)) as llm:
        speculator, replayed, launched = speculator_of(llm), [], []
        manager, draft = speculator.decode_cudagraph_manager, speculator._generate_fused_drafts
        replay = manager.run_fullgraph
        monkeypatch.setattr(manager, "run_fullgraph", lambda descriptor: replayed.append(descriptor) or replay(descriptor))
        monkeypatch.setattr(speculator, "_generate_fused_drafts", lambda *args: launched.append(args) or draft(*args))
        generate(llm, [tokens[100 * i : 100 * i + 200] for i in range(6)], 40)
    ones = sum(getattr(descriptor, "num_speculative_tokens", 1) == 1 for descriptor in replayed)
    assert ones >= 15 and not launched, (ones, len(launched))


def test_the_number_of_drafts_is_chosen_while_running(model, prompts, expected, monkeypatch):
    """As it is chosen, and at random in every step: each number has graphs of its own, of drafts and of verifications."""
    with engine(model, **SIZE, **quantspec("auto")) as llm:
        assert_same_or_tied(expected, generate(llm, prompts, MAX_TOKENS), TIE, "auto")
        speculator, replayed, launched, rng = speculator_of(llm), [], [], random.Random(0)
        manager, draft = speculator.decode_cudagraph_manager, speculator._generate_fused_drafts
        replay = manager.run_fullgraph
        monkeypatch.setattr(manager, "run_fullgraph", lambda descriptor: replayed.append(descriptor) or replay(descriptor))
        monkeypatch.setattr(speculator, "_generate_fused_drafts", lambda *args: launched.append(args) or draft(*args))
        monkeypatch.setattr(DraftLength, "choose", lambda *args, **kwargs: Plan(Drafts(rng.choice(AUTO_NUMBERS))))
        assert_same_or_tied(expected, generate(llm, prompts, MAX_TOKENS), TIE, "at random")
    assert {descriptor.num_speculative_tokens for descriptor in replayed} == set(AUTO_NUMBERS) - {0} and not launched


def plans_at_random(monkeypatch, seed: int) -> set[Drafts]:
    """Every step's plan is drawn at random, and which requests draft by n-grams; returns what was drawn, as it grows."""
    rng, drawn = random.Random(seed), set()

    def choose(self, requests, context, with_prompts=False):
        drafts = rng.choice(self.choices)
        some = frozenset(request for request in requests if rng.random() < 0.5)
        drawn.add(drafts)
        return Plan(drafts, frozenset() if drafts.by_ngrams else some)

    monkeypatch.setattr(DraftLength, "choose", choose)
    return drawn


def test_n_grams_beside_the_model_s_drafts(model, prompts, expected, monkeypatch):
    """As the policy decides, and at random in every step; verifications of each number replay a graph."""
    with engine(model, **SIZE, **quantspec("auto", ngram="auto", prompt_lookup_min=2)) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert_same_or_tied(expected, generate(llm, prompts, MAX_TOKENS), TIE, "auto")
        count = scheduler._ngram_count
        assert len(speculation_counts(llm)[1]) == NGRAM_NUMBERS[-1] and count.drafted >= count.accepted
        speculator, launched = speculator_of(llm), []
        draft = speculator._generate_fused_drafts
        monkeypatch.setattr(speculator, "_generate_fused_drafts", lambda *args: launched.append(args) or draft(*args))
        drawn = plans_at_random(monkeypatch, 0)
        assert_same_or_tied(expected, generate(llm, prompts, MAX_TOKENS), TIE, "at random")
        assert drawn == set(scheduler.draft_length.choices) and count.accepted > 20 and not launched
        # A text that repeats itself, by n-grams alone: what is found is what was said before.
        monkeypatch.setattr(DraftLength, "choose", lambda *args, **kwargs: Plan(Drafts(12, by_ngrams=True)))
        before = count.drafted, count.accepted
        passage = prompts[-3][:120]
        generate(llm, [passage * 6], MAX_TOKENS)
        drafted, accepted = count.drafted - before[0], count.accepted - before[1]
        assert drafted and accepted > 0.1 * drafted, (drafted, accepted)


def test_n_grams_leave_the_distribution_of_draws(books_4m, passage, monkeypatch):
    """Two samples: speculation off, and plans at random, after a text that is said twice."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(books_4m).encode(passage)
    prompt, size = tokens[:200] + tokens[:120], {"max_model_len": 2048, "max_num_seqs": 128}
    with engine(books_4m, **size, **QUANTSPEC_CACHE) as llm:
        off = draw(llm, prompt, SEEDS["off"], temperature=0.8)
    with engine(books_4m, **size, **quantspec("auto", ngram="auto", prompt_lookup_min=2)) as llm:
        plans_at_random(monkeypatch, 1)
        p = statistics(off, draw(llm, prompt, SEEDS["on"], temperature=0.8))
        count = llm.llm_engine.engine_core.engine_core.scheduler._ngram_count
        assert 0 < count.accepted < count.drafted
    assert min(p.values()) > ALPHA, p


def test_min_p_and_logit_bias(model, prompts):
    """vLLM's sampler applies both to the rows of drafts. What is a tie is a matter of the logits as they are sampled."""
    sampling = {"min_p": 0.2, "logit_bias": {token: 2.0 for token in range(0, 4000, 5)}, "repetition_penalty": 1.2}
    size = SIZE | {"logprobs_mode": "processed_logprobs"}
    with engine(model, **size, **QUANTSPEC_CACHE) as llm:
        plain, biased = (generate(llm, prompts, MAX_TOKENS, **s) for s in ({}, sampling))
    with engine(model, **size, **quantspec(4)) as llm:
        assert_same_or_tied(biased, generate(llm, prompts, MAX_TOKENS, **sampling), TIE, "biased")
        # Of the token with the largest share alone, at any temperature.
        sure = generate(llm, prompts, MAX_TOKENS, temperature=1.0, min_p=1.0, seed=1)
    assert_same_or_tied(plain, sure, TIE, "min_p of 1")
    assert [a.tokens for a in plain] != [a.tokens for a in biased]


def test_ngram_drafts(model, prompts, expected):
    """vLLM's n-grams on the hierarchical cache: as many drafts as they find, none of a model."""
    ngram = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    with engine(model, **SIZE, **QUANTSPEC_CACHE, speculative_config=ngram) as llm:
        assert_same_or_tied(expected, generate(llm, prompts, MAX_TOKENS), TIE, "n-grams")
        assert speculation_counts(llm)[1][0] > 20


def test_preemption(model, prompts):
    """A pool too small for the load: requests are preempted, recompute, and finish with the output they have alone."""
    prompts = [prompts[-1][60 * i : 60 * i + 500 + 130 * i] for i in range(6)]
    size = {"max_model_len": 2048, "max_num_seqs": 6, "enable_prefix_caching": False}
    with engine(model, num_gpu_blocks_override=60, **size, **quantspec(4)) as crowded:
        alone = [generate(crowded, [p], 260)[0] for p in prompts]
        together = generate(crowded, prompts, 260)
        metrics = {m.name: m.value for m in crowded.get_metrics() if hasattr(m, "value")}
        assert metrics["vllm:num_preemptions"] > 0
    assert [len(a.tokens) for a in together] == [260] * 6
    assert_same_or_tied(alone, together, RULE_3)


def test_acceptance_on_novels(books_30m):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(books_30m)
    prompts = []
    for novel in ("dracula", "emma", "martin-eden"):
        tokens = tokenizer.encode(shared_path(f"data/books/{novel}.txt").read_text(encoding="utf-8"))
        prompts += [tokens[i * 20000 : i * 20000 + 16000] for i in range(3)]
    with engine(books_30m, **SIZE, **quantspec(4)) as llm:
        generate(llm, prompts, 200)
        drafts, accepted = speculation_counts(llm)
    rates = [a / drafts for a in accepted]
    print(f"16k tokens, {drafts} drafts: {[round(r, 3) for r in rates]}")
    assert rates[0] >= 0.9 and sum(rates) / 4 >= 0.8 and rates[-1] < 1


@pytest.mark.parametrize("options", [{}, {"draft_selection": "window"}, {"draft_selection": "snapkv"}])
def test_sparse_drafts(model, prompts, expected, options):
    """Drafts that read 4 of up to 90 pages: the same output, and chosen pages are really what they read."""
    with engine(model, **SIZE, **quantspec(4, draft_context=4 * G, **options)) as llm:
        answers = generate(llm, prompts, MAX_TOKENS)
        assert_same_or_tied(expected, answers, TIE, f"sparse, {options}")
        drafts, accepted = speculation_counts(llm)
        alone = [generate(llm, [p], MAX_TOKENS)[0] for p in prompts[-3:]]
        sparse = speculator_of(llm).page_scores
        count, dense = int(sparse.count[0]), int(sparse.dense_from[0])
        assert (count, dense) == (4, dense) and 85 < dense < 100
        chosen = sparse.page_list[:, :, int(sparse.begin[0]) :][:, :, :4]
        assert chosen.unique().numel() > 4 or options == {"draft_selection": "window"}
    assert_close(expected[-3:], alone)
    assert accepted[0] > 0.5 * drafts


def test_sparse_drafts_where_they_pay(model, prompts, expected, monkeypatch):
    """``draft_context: auto``: a batch with a long request replays the graphs of sparse drafts, one without plain ones."""
    monkeypatch.setattr(sparse_policy, "min_total_pages", lambda **shape: 40)
    replayed, run_fullgraph = Counter(), PlainGraphs.run_fullgraph

    def counting(self, desc):
        replayed[type(self).__name__, self.sparse.plain] += 1
        return run_fullgraph(self, desc)

    monkeypatch.setattr(PlainGraphs, "run_fullgraph", counting)
    names = ("TargetCudaGraphManager", "DraftCudaGraphManager")
    with engine(model, **SIZE, **quantspec(4, draft_context="auto")) as llm:
        assert_same_or_tied(expected, generate(llm, prompts, MAX_TOKENS), TIE, "auto, in a batch")
        assert all(replayed[name, False] > 5 for name in names)
        sparse = speculator_of(llm).page_scores
        assert int(sparse.count.max()) >= 8 and 0 < sparse.share.mean < 0.9
        replayed.clear()
        short = [generate(llm, [p], MAX_TOKENS)[0] for p in prompts[-3:-1]]
        assert_close(expected[-3:-1], short)
        assert all(replayed[name, True] > 5 and not replayed[name, False] for name in names)
        sparse.count.fill_(3)  # nothing writes it in a plain step, and nobody reads it
        assert_close(expected[-3:-1], [generate(llm, [p], MAX_TOKENS)[0] for p in prompts[-3:-1]])
        assert (sparse.count == 3).all()
        assert_close(expected[-1:], generate(llm, prompts[-1:], MAX_TOKENS))
        assert all(replayed[name, False] > 5 for name in names)
        # Whoever reads everything by choice, in any cycle: the output stays, and a batch of such requests is plain.
        rng, read = random.Random(4), []

        def some(self, requests, tokens, scored, number):
            whole = {name for name in requests if rng.random() < 0.5}
            read.append(bool(sparse.reads_all.any()))
            return whole, set(requests) - whole

        monkeypatch.setattr(SparseChoice, "choose", some)
        assert_same_or_tied(expected, generate(llm, prompts, MAX_TOKENS), TIE, "auto, some read everything")
        assert sum(read) > 0
        monkeypatch.setattr(SparseChoice, "choose", lambda self, requests, *more: (set(requests), set()))
        replayed.clear()
        assert_close(expected[-1:], generate(llm, prompts[-1:], MAX_TOKENS))
        assert all(replayed[name, True] > 5 for name in names)


def test_cache_in_4_bits(model, prompts):
    """Lossless on that cache, too, and a draft that reads the very pages that the target reads is believed more often."""
    cache = {"kv_cache_dtype": "quantspec_int4"}
    with engine(model, **SIZE, **cache) as llm:
        expected = generate(llm, prompts, MAX_TOKENS)
    with engine(model, **SIZE, **cache, **quantspec(4)) as llm:
        assert_same_or_tied(expected, generate(llm, prompts, MAX_TOKENS), TIE, "4 bits")
        drafts, accepted = speculation_counts(llm)
    assert accepted[0] > 0.6 * drafts
