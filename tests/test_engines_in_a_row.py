"""Engines of every kind, one after another in one process: nothing that the plugin does to the process harms the next."""

from engine_tools import QUANTSPEC_CACHE, assert_same_or_tied, engine, generate, quantspec


def test_engines_in_a_row(books_4m, passage):
    prompts = [list(range(5, 300)), list(range(40, 180))]
    plain = []
    for arguments in ({}, quantspec(3), {}, QUANTSPEC_CACHE, quantspec(4, group_size=64), {}):
        with engine(books_4m, max_model_len=1024, **arguments) as llm:
            answers = generate(llm, prompts, 8)
            runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
            groups = len(runner.kv_cache_config.kv_cache_groups)
        assert groups == (2 if arguments else 1)  # pages and windows, or vLLM's own cache
        if not arguments:
            plain.append(answers)
    assert_same_or_tied(plain[0], plain[1], 0.0)
    assert_same_or_tied(plain[0], plain[2], 0.0)
