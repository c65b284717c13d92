"""QuantSpec's options and the ways of asking for it: names, defaults, one sentence per mistake."""

import json
import logging
import pickle
from types import SimpleNamespace

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_quantspec import register
from vllm_quantspec.config import (
    AUTO_NUMBERS,
    AUTO_SCHEDULE,
    NGRAM_NUMBERS,
    NGRAM_SCHEDULE,
    QuantSpecOptions,
    is_quantspec,
    named_options,
    parse_options,
)
from vllm_quantspec.integration.draft import scheduler, sparse_scheduler
from vllm_quantspec.integration.startup import speculative_config
from vllm_quantspec.integration.startup.backend_name import quantspec_backend
from vllm_quantspec.integration.startup.cache_dtype import page_bits
from vllm_quantspec.integration.startup.engine_args import extension_path


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()
    register()  # a second time changes nothing


def test_defaults():
    options, vllm_options = parse_options("quantspec")
    assert options == QuantSpecOptions(
        4, 128, "int4", "int4", "int4", 128, "auto", "none", None, "model", True, True, False, "auto", "attention"
    )
    assert vllm_options == {}


def test_a_draft_without_weights_of_its_own_has_no_experts_either():
    options, _ = parse_options({"method": "quantspec", "draft_weights": "target"})
    assert options.draft_experts == "target"


def test_a_number_that_is_chosen_while_running():
    options, vllm_options = parse_options({"num_speculative_tokens": "auto"})
    assert options.chooses_number and options.most_drafts == AUTO_NUMBERS[-1] == 8 and not vllm_options
    assert AUTO_NUMBERS[:2] == (0, 1) and tuple(number for _, _, number in AUTO_SCHEDULE) == AUTO_NUMBERS
    fixed = QuantSpecOptions(num_speculative_tokens=3)
    assert not fixed.chooses_number and fixed.most_drafts == 3


def test_n_grams_beside_the_model_s_drafts():
    options, vllm_options = parse_options({"num_speculative_tokens": "auto", "ngram": "auto", "prompt-lookup-max": 8})
    assert (options.prompt_lookup_min, options.prompt_lookup_max, options.most_drafts) == (3, 8, NGRAM_NUMBERS[-1])
    assert not vllm_options
    numbers = [number for _, _, number in NGRAM_SCHEDULE]
    assert numbers == sorted({*AUTO_NUMBERS, *NGRAM_NUMBERS}) and NGRAM_NUMBERS[-1] == 12
    assert QuantSpecOptions().ngram == "off"


def test_dashes_and_vllm_options_are_taken():
    options, vllm_options = parse_options(
        {"method": "quantspec", "num-speculative-tokens": 7, "group_size": 64, "draft_sample_method": "greedy"}
    )
    assert (options.num_speculative_tokens, options.group_size) == (7, 64)
    assert vllm_options == {"draft_sample_method": "greedy"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_speculative_token": 4}, "did you mean 'num_speculative_tokens'"),
        ({"draft_weight": "int4"}, "did you mean 'draft_weights'"),
        ({"gruop_size": 64}, "did you mean 'group_size'"),
        ({"zzzz": 1}, "the options are num_speculative_tokens"),
        ({"num_speculative_tokens": 0}, "from 1 to 32"),
        ({"num_speculative_tokens": 2.5}, "must be an integer"),
        ({"num_speculative_tokens": True}, "must be an integer"),
        ({"ngram": "auto"}, "num_speculative_tokens is 4; set num_speculative_tokens to 'auto', or drop ngram"),
        ({"num_speculative_tokens": "auto", "ngram": "on"}, "ngram must be 'off' or 'auto', not 'on'"),
        ({"prompt_lookup_min": 2}, "but ngram is 'off'"),
        ({"ngram": "auto", "num_speculative_tokens": "auto", "prompt_lookup_min": 6}, "in this order, not 6 and 5"),
        ({"ngram": "auto", "num_speculative_tokens": "auto", "prompt_lookup_max": 40}, "from 1 to 32"),
        ({"num_speculative_tokens": "many"}, "must be an integer from 1 to 32 or 'auto', not 'many'"),
        (
            {"num_speculative_tokens": "auto", "num_speculative_tokens_per_batch_size": [[1, 8, 4]]},
            "'auto' chooses .* while running, .* drop one of them",
        ),
        ({"group_size": 100}, "must be 64 or 128"),
        ({"draft_weights": "int3"}, "must be 'int4' or 'int8' or 'mixed' or 'auto' or 'target', not 'int3'"),
        ({"weight_bits": 6}, "weight_bits 6 is for draft_weights 'mixed', but draft_weights is 'int4'; set it to 'mixed'"),
        ({"draft_weights": "auto", "weight_bits": 6.2}, "but draft_weights is 'auto'"),
        ({"draft_weights": "mixed", "weight_bits": 4}, "must be a number from 4.25 to 8.25, .* not 4"),
        ({"draft_weights": "mixed", "weight_bits": 8.3}, "with scales and zero points of groups of 128"),
        ({"draft_weights": "mixed", "weight_bits": 4.4, "weight_group_size": 64}, "from 4.5 to 8.5, .* groups of 64"),
        ({"draft_weights": "mixed", "weight_bits": "6"}, "must be a number .* not '6'"),
        ({"draft_weights": "mixed", "weight_bits": True}, "must be a number .* not True"),
        ({"draft_weights": "mixed", "weight_bits": float("nan")}, "must be a number .* not nan"),
        ({"draft_experts": "int8"}, "must be 'target' or 'int4', not 'int8'"),
        ({"draft_expert": "int4"}, "did you mean 'draft_experts'"),
        ({"draft_experts": "int4", "draft_weights": "target"}, "is for a draft in INT4 or INT8, .* drop one of them"),
        ({"draft_kv": "fp8"}, "must be 'int4' or 'int8'"),
        ({"weight_group_size": 48}, "must be 32 or 64 or 128"),
        ({"weight_rotation": "random"}, "must be 'none' or 'hadamard'"),
        ({"draft_activations": "int8"}, "draft_activations must be 'model' or 'fp8', not 'int8'"),
        ({"draft_activations": "fp8", "draft_weights": "int8"}, "for INT4 weights, but draft_weights is 'int8'; drop one"),
        ({"draft_activations": "fp8", "draft_weights": "target"}, "INT4 weights, but draft_weights is 'target'; drop one"),
        ({"weight_rounding": "nearest"}, "must be 'auto' or 'search' or 'gptq'"),
        ({"weight_rounding": "gptq", "draft_weights": "target"}, "drop one of them"),
        ({"quantize_lm_head": "yes"}, "must be False or True"),
        ({"quantize_lm_head": 1}, "must be False or True"),
        ({"draft_context": 0}, "0 is a number of tokens, of which drafts read whole pages of 128, but it is less than one"),
        ({"draft_context": 1}, "a number of tokens from 128 on"),
        ({"draft_context": -4096}, "less than one"),
        ({"draft_context": 127}, "less than one"),
        ({"draft_context": 63, "group_size": 64}, "whole pages of 64"),
        ({"draft_context": "0"}, "'0' is a number of tokens"),
        ({"draft_context": 0.0}, "0.0 is a fraction of the old tokens, but not one above 0 and up to 1"),
        ({"draft_context": -0.5}, "not one above 0"),
        ({"draft_context": 1.5}, "not one above 0 and up to 1; .* a number of tokens without a decimal point"),
        ({"draft_context": "2048.0"}, "a number of tokens without a decimal point"),
        ({"draft_context": float("nan")}, "not one above 0"),
        ({"draft_context": "inf"}, "not one above 0"),
        ({"draft_context": True}, "must be 'auto', 'all' or a number, not True"),
        ({"draft_context": None}, "must be 'auto', 'all' or a number, not None"),
        ({"draft_context": [1024]}, "must be 'auto', 'all' or a number"),
        ({"draft_context": "some"}, "must be 'auto', 'all' or a number, not 'some'"),
        ({"draft_selection": "quest"}, "must be 'attention' or 'window' or 'snapkv', not 'quest'"),
        ({"draft_selection": True, "draft_context": 1024}, "must be 'attention'"),
        (
            {"draft_selection": "window", "draft_context": "all"},
            "draft_context is 'all', with which drafts read every page; set draft_context",
        ),
    ],
)
def test_mistakes_get_one_sentence(config, says):
    with pytest.raises(ValueError, match=says) as error:
        parse_options({"method": "quantspec", **config})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("all", "all"),
        (" auto ", "auto"),
        (2048, 2048),
        ("2048", 2048),
        (0.125, 0.125),
        ("0.125", 0.125),
        ("1e-1", 0.1),
        (1.0, 1.0),
    ],
)
def test_a_draft_context_may_be_a_word_or_a_number_or_a_number_in_a_word(given, parsed):
    options, _ = parse_options({"method": "quantspec", "draft_context": given})
    assert options.draft_context == parsed and type(options.draft_context) is type(parsed)


def test_other_methods_are_not_ours():
    assert is_quantspec("quantspec") and is_quantspec({"method": "quantspec"})
    assert not is_quantspec({"method": "ngram"}) and not is_quantspec(None) and not is_quantspec("ngram")


@pytest.mark.parametrize("text", ["quantspec", '{"method": "quantspec", "num_speculative_tokens": 3}'])
def test_command_line_takes_a_word_or_json(text):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--speculative-config", text])
    assert is_quantspec(args.speculative_config)
    args = parser.parse_args(["--speculative-config", json.dumps({"method": "ngram", "num_speculative_tokens": 2})])
    assert args.speculative_config == {"method": "ngram", "num_speculative_tokens": 2}
    with pytest.raises(SystemExit):
        parser.parse_args(["--speculative-config", "quantspek"])


def test_command_line_takes_the_backend_and_the_short_forms():
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    assert parser.parse_args(["--attention-backend", "QUANTSPEC"]).attention_backend == "QUANTSPEC"
    args = parser.parse_args(["--spec-method", "quantspec", "--spec-tokens", "6"])
    assert (args.spec_method, args.spec_tokens) == ("quantspec", 6)


def test_command_line_takes_the_names_of_the_cache():
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    assert parser.parse_args(["--kv-cache-dtype", "quantspec_int4"]).kv_cache_dtype == "quantspec_int4"
    assert parser.parse_args(["--kv-cache-dtype", "fp8"]).kv_cache_dtype == "fp8"
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv-cache-dtype", "quantspec_int5"])


def test_what_a_user_has_named():
    assert named_options("quantspec") == named_options({"method": "quantspec", "draft_sample_method": "greedy"}) == ()
    given = {"method": "quantspec", "draft-context": "auto", "num_speculative_tokens": 4}
    assert named_options(given) == ("draft_context", "num_speculative_tokens")


def make(books_4m: str, **kwargs):
    return EngineArgs(model=books_4m, **{"max_model_len": 2048} | kwargs).create_engine_config()


def test_engine_config_of_each_way_to_ask(books_4m):
    for kwargs in (
        {"speculative_config": "quantspec"},
        {"speculative_config": {"method": "quantspec", "num_speculative_tokens": 4}},
        {"spec_method": "quantspec", "spec_tokens": 4},
    ):
        config = make(books_4m, **kwargs)
        assert config.num_speculative_tokens == 4
        assert config.cache_config.block_size == 128
        assert config.attention_config.backend is quantspec_backend()
        assert "quantspec" in repr(config.speculative_config)
    config = make(books_4m, speculative_config={"method": "quantspec", "group_size": 64})
    assert config.cache_config.block_size == 64
    config = make(books_4m, attention_backend="QUANTSPEC", block_size=64)
    assert config.speculative_config is None and config.cache_config.block_size == 64


@pytest.mark.parametrize("name, bits", [("quantspec_int4", 4), ("quantspec_int8", 8)])
@pytest.mark.parametrize("more", [{}, {"speculative_config": "quantspec"}, {"attention_backend": "QUANTSPEC"}])
def test_the_name_of_the_cache_is_enough(name, bits, more, books_4m):
    users = {"mine": 1}
    config = make(books_4m, kv_cache_dtype=name, additional_config=users, **more)
    assert config.attention_config.backend is quantspec_backend() and config.cache_config.block_size == 128
    assert page_bits(config) == bits and config.cache_config.cache_dtype == "auto"
    assert config.additional_config["mine"] == 1 and users == {"mine": 1}
    assert page_bits(pickle.loads(pickle.dumps(config))) == bits
    assert make(books_4m, kv_cache_dtype=name, block_size=64).cache_config.block_size == 64


def test_without_a_name_pages_have_8_bits(books_4m):
    assert page_bits(make(books_4m, attention_backend="QUANTSPEC")) == 8
    assert page_bits(make(books_4m, speculative_config="quantspec")) == 8


@pytest.mark.parametrize("context", ["all", "auto", 1024, 0.125, "1024"])
def test_the_draft_context_reaches_the_workers(context, books_4m):
    config = make(books_4m, speculative_config={"method": "quantspec", "draft_context": context})
    copy = pickle.loads(pickle.dumps(config)).speculative_config
    expected = int(context) if context == "1024" else context
    assert copy.draft_context == expected and type(copy.draft_context) is type(expected)
    assert copy.draft_selection == "attention" and f"draft_context={expected!r}" in repr(copy)


def test_draft_experts_reach_the_workers(books_4m):
    """And code that was compiled for the one is not taken for the other."""
    target, int4 = (
        pickle.loads(pickle.dumps(make(books_4m, speculative_config={"method": "quantspec", **options}))).speculative_config
        for options in ({"draft_experts": "target"}, {})
    )
    assert (target.draft_experts, int4.draft_experts) == ("target", "int4")
    assert "draft_experts='int4'" in repr(int4)
    assert target.compute_hash() != int4.compute_hash()


def test_a_config_says_which_weights_may_run(books_4m, monkeypatch):
    """By default on a GPU some have 8 bits where GPTQ can run, which is known later."""
    plain, asked, rounded = (
        make(books_4m, speculative_config={"method": "quantspec", **options}).speculative_config
        for options in ({}, {"draft_weights": "int4"}, {"weight_rounding": "search"})
    )
    assert "draft_weights='int4'," in repr(plain)
    monkeypatch.setattr(speculative_config, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    assert "draft_weights='int4, auto if rounded by GPTQ'" in repr(plain)
    assert "draft_weights='int4'," in repr(asked) and "draft_weights='int4'," in repr(rounded)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_auto_brings_a_scheduler_of_its_own(asynchronous, books_4m, monkeypatch):
    if asynchronous:  # the CPU platform turns it off
        monkeypatch.setattr(type(current_platform), "check_and_update_config", classmethod(lambda cls, config: None))
    auto = {"method": "quantspec", "num_speculative_tokens": "auto"}
    config = make(books_4m, speculative_config=auto, async_scheduling=asynchronous)
    copy = pickle.loads(pickle.dumps(config))
    assert copy.num_speculative_tokens == AUTO_NUMBERS[-1] and copy.speculative_config.chooses_number
    cls = copy.scheduler_config.get_scheduler_cls()
    assert issubclass(cls, scheduler.DraftLengthScheduler) and issubclass(cls, AsyncScheduler) == asynchronous
    assert copy.speculative_config.uses_dynamic_speculative_decoding()
    assert "num_spec_tokens=up to 8" in repr(copy.speculative_config)
    assert not copy.speculative_config.use_ngram()
    ngrams = pickle.loads(pickle.dumps(make(books_4m, speculative_config=auto | {"ngram": "auto"})))
    assert ngrams.num_speculative_tokens == NGRAM_NUMBERS[-1] and ngrams.speculative_config.use_ngram()
    assert (ngrams.speculative_config.prompt_lookup_min, ngrams.speculative_config.prompt_lookup_max) == (3, 5)
    fixed = make(books_4m, speculative_config="quantspec")
    assert fixed.scheduler_config.scheduler_cls is None and not fixed.speculative_config.chooses_number
    assert not fixed.speculative_config.uses_dynamic_speculative_decoding()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("number", [4, "auto"])
def test_an_automatic_draft_context_brings_one_too(number, asynchronous, books_4m, monkeypatch):
    if asynchronous:
        monkeypatch.setattr(type(current_platform), "check_and_update_config", classmethod(lambda cls, config: None))
    size = {"max_model_len": 8192, "async_scheduling": asynchronous}
    for given in ({}, {"draft_context": "auto"}):
        auto = {"method": "quantspec", "num_speculative_tokens": number, **given}
        config = pickle.loads(pickle.dumps(make(books_4m, speculative_config=auto, **size)))
        cls = config.scheduler_config.get_scheduler_cls()
        assert issubclass(cls, sparse_scheduler.SparseScheduler) and issubclass(cls, AsyncScheduler) == asynchronous
        assert issubclass(cls, scheduler.DraftLengthScheduler) == (number == "auto")
    for other in ({"draft_context": 1024}, {"draft_context": "all"}, {"draft_context": "auto", "draft_selection": "snapkv"}):
        config = make(books_4m, speculative_config={"method": "quantspec", **other}, **size)
        assert config.scheduler_config.scheduler_cls is None


def test_vllm_warns_of_other_schedulers_alone(books_4m):
    class Own(AsyncScheduler):
        pass

    said, logger, handler = [], logging.getLogger("vllm.config.scheduler"), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        config = make(books_4m, speculative_config="quantspec", max_model_len=8192)
        config.scheduler_config.get_scheduler_cls()
        assert not said
        make(books_4m, scheduler_cls=Own).scheduler_config.get_scheduler_cls()
    finally:
        logger.removeHandler(handler)
    assert len(said) == 1 and "Using custom scheduler class" in said[0]


@pytest.mark.parametrize(("group", "longest"), [(128, 33 * 128), (64, 65 * 64)])
def test_vllms_own_scheduler_where_no_request_can_be_long_enough(group, longest, books_4m):
    """A request's window is not among the 4,096 old tokens that sparse drafts begin with."""
    options = {"method": "quantspec", "group_size": group}
    too_short, long_enough = (make(books_4m, speculative_config=options, max_model_len=n) for n in (longest - 1, longest))
    assert too_short.scheduler_config.scheduler_cls is None and too_short.speculative_config.draft_context == "auto"
    assert "SparseScheduler" in long_enough.scheduler_config.scheduler_cls
    chosen = make(books_4m, speculative_config=options, max_model_len=longest - 1, scheduler_cls="some.Scheduler")
    assert chosen.scheduler_config.scheduler_cls == "some.Scheduler"


def test_a_draft_context_beyond_the_models_length_is_refused(books_4m):
    with pytest.raises(ValueError, match="quantspec: draft_context 2049 is more tokens than .* has, 2048") as error:
        make(books_4m, speculative_config={"method": "quantspec", "draft_context": 2049})
    assert "\n" not in str(error.value)
    make(books_4m, speculative_config={"method": "quantspec", "draft_context": 2048})


def test_an_engine_without_quantspec_is_left_alone(books_4m):
    config = make(books_4m)
    assert config.attention_config.backend is None
    assert config.parallel_config.worker_extension_cls == ""
    assert config.speculative_config is None


def test_configuration_survives_pickling(books_4m):
    config = make(books_4m, speculative_config="quantspec")
    copy = pickle.loads(pickle.dumps(config))
    assert copy.attention_config.backend is quantspec_backend()
    assert type(copy.speculative_config) is type(config.speculative_config)


def test_a_users_worker_extension_is_kept():
    from vllm_quantspec.integration.startup import worker

    path = extension_path("collections.OrderedDict")
    module, name = path.rsplit(".", 1)
    assert module == worker.__name__ and getattr(worker, name).__name__ == "OrderedDict"
    assert extension_path(path) == path
    with pytest.raises(AttributeError):
        _ = worker.WorkerExtension_of_
