"""Engines of every kind, one after another in one process: nothing that the plugin does to the process harms the next."""

import engine_tools
import pytest
from engine_tools import QUANTSPEC_CACHE, assert_same_or_tied, engine, generate, quantspec


def test_engines_in_a_row(books_4m, passage):
    prompts = [list(range(5, 300)), list(range(40, 180))]
    plain = []
    for arguments in ({}, quantspec(3), QUANTSPEC_CACHE, quantspec(4, group_size=64), {}):
        with engine(books_4m, max_model_len=1024, **arguments) as llm:
            answers = generate(llm, prompts, 8)
            runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
            groups = len(runner.kv_cache_config.kv_cache_groups)
        assert groups == (2 if arguments else 1)  # pages and windows, or vLLM's own cache
        if not arguments:
            plain.append(answers)
    assert_same_or_tied(plain[0], plain[1], 0.0)


def test_an_engine_that_failed_fails_at_once_afterwards(books_4m, monkeypatch):
    """vLLM would take empty steps for ever once the requests of failed steps hold every seat."""
    with engine(books_4m, max_model_len=1024, max_num_seqs=2) as llm:
        core = llm.llm_engine.engine_core
        working = core.get_output

        def fails():
            raise AttributeError("no such operator")

        monkeypatch.setattr(core, "get_output", fails)
        with pytest.raises(AttributeError, match="no such operator"):
            generate(llm, [[1, 2, 3]], 8)
        monkeypatch.setattr(core, "get_output", working)
        with pytest.raises(RuntimeError, match="failed before"):
            generate(llm, [[1, 2, 3]], 8)


def test_an_engine_that_gets_nowhere_fails(books_4m, monkeypatch):
    monkeypatch.setattr(engine_tools, "MAX_IDLE_STEPS", 50)
    with engine(books_4m, max_model_len=1024, max_num_seqs=2) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", 0)
        with pytest.raises(RuntimeError, match="51 steps in a row without an output"):
            generate(llm, [[1, 2, 3]], 8)
