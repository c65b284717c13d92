"""What end_to_end.py derives from its measurements, and what its report says of them."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import capacity_report  # noqa: E402
import end_to_end  # noqa: E402
import end_to_end_configs as configs  # noqa: E402
import end_to_end_report as report  # noqa: E402
import model_shapes  # noqa: E402
import serve_bench  # noqa: E402
from end_to_end_measure import draft_numbers  # noqa: E402

from vllm_quantspec import estimate  # noqa: E402
from vllm_quantspec.config import AUTO_NUMBERS  # noqa: E402
from vllm_quantspec.draft_length import Drafts, Plan  # noqa: E402

BF16 = {"config": "bf16", "context": 32768, "batch": 4, "ms_per_step": 10.0, "ms_per_token": 10.0}
BF16 |= {"other_peak_gib": 20.0, "kv_gib": 16.0}


def drafting(config: str, ms_per_step: float) -> dict:
    return BF16 | {"config": config, "ms_per_step": ms_per_step, "ms_per_token": 99.0}


def test_configurations():
    assert [configs.drafted(c) for c in ("bf16", "fp8", "cache", "4", "ngram-5", "draft-3")] == [0, 0, 0, 4, 5, 3]
    assert [configs.drafted(c) for c in ("cache-int4", "int4-5")] == [0, 5]
    kinds = [report.kind_of(c) for c in ("cache-int4", "int4-5", "5", "v1-draft-5")]
    assert kinds == ["cache-int4", "int4", "quantspec", "draft"]
    folders = {"self": "/target", "draft": "/small"}

    def speculative(config: str) -> dict:
        return configs.engine_arguments(config, 0.9, {"group_size": 64}, folders)["speculative_config"]

    assert speculative("4")["method"] == "quantspec" and speculative("4")["group_size"] == 64
    assert speculative("4")["draft_context"] == speculative("drafts-auto")["draft_context"] == "all"
    assert speculative("4")["draft_experts"] == speculative("auto-4")["draft_experts"] == "target"
    assert speculative("auto-4")["draft_context"] == "auto" and speculative("sparse8-4")["draft_context"] == 1 / 8
    overridden = configs.engine_arguments("4", 0.9, {"draft_context": 0.5}, folders)
    assert overridden["speculative_config"]["draft_context"] == 0.5
    assert speculative("ngram-5")["method"] == "ngram_gpu" and speculative("ngram-5")["num_speculative_tokens"] == 5
    assert [speculative(c)["model"] for c in ("draft-3", "self-3")] == ["/small", "/target"]
    assert configs.engine_arguments("bf16", 0.9, {}, folders) == {}
    assert configs.engine_arguments("marlin", 0.9, {}, folders) == {"linear_backend": "marlin"}
    once = {"additional_config": {"quantspec": {"one_copy": True}}}
    assert [configs.one_copy(c, True) for c in ("bf16", "marlin", "ngram-5", "cache", "4")] == [{}, {}, {}, once, once]
    assert configs.one_copy("4", False) == {}
    int4 = configs.engine_arguments("int4-4", 0.9, {"group_size": 64}, folders)
    assert int4["kv_cache_dtype"] == "quantspec_int4" and int4["speculative_config"] == speculative("4")
    assert configs.engine_arguments("cache-int4", 0.9, {}, folders) == {"kv_cache_dtype": "quantspec_int4"}


def test_server_arguments():
    assert serve_bench.server_arguments("bf16", 0.9) == ["--load-format", "dummy"]
    caches = {c: serve_bench.server_arguments(c, 0.9)[3] for c in serve_bench.CONFIGS if c != "bf16"}
    assert caches["cache"] == caches["quantspec"] == "quantspec_int8" and caches["fp8"] == "fp8"
    assert caches["cache-int4"] == caches["int4"] == "quantspec_int4"
    drafting = [c for c in serve_bench.CONFIGS if "--speculative-config" in serve_bench.server_arguments(c, 0.9)]
    assert drafting == ["quantspec", "drafts-auto", "int4"]
    options = [json.loads(serve_bench.server_arguments(c, 0.9)[-1]) for c in ("quantspec", "drafts-auto")]
    assert [o["num_speculative_tokens"] for o in options] == [4, "auto"]
    assert {o["draft_context"] for o in options} == {"all"}


def test_what_a_server_answered_over_bf16():
    load = {"requests": 50, "seconds": 10.0, "generated_tokens": 300}
    rows = [{"config": "bf16", "load": load, "bench": {"output_throughput": 100.0}}]
    rows += [{"config": "quantspec", "load": load | {"seconds": 5.0}, "bench": {"output_throughput": 250.0}}]
    serve_bench.compare_with_bf16(rows[1:])
    assert "over_bf16" not in rows[1]
    serve_bench.compare_with_bf16(rows)
    assert rows[1]["over_bf16"] == {"answers": pytest.approx(2.0), "tokens": pytest.approx(2.0), "bench": 2.5}
    assert set(rows[0]["over_bf16"].values()) == {1.0}


def test_acceptance_granted(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert configs.synthetic("2", 0.9)["synthetic_acceptance_rates"] == [0.9, pytest.approx(0.81)]
    assert configs.synthetic("self-2", 0.9)["synthetic_acceptance_rates"] == [1.0, 1.0]
    assert configs.synthetic("draft-1", 0.9)["synthetic_acceptance_rates"] == [configs.ACCEPTANCE["draft"]]


def test_the_number_of_drafts_chosen_and_held(tmp_path, capsys, monkeypatch):
    """A step's tokens are those of its number of drafts: 1 + 0.5 of one, 1 of none; 10 ms of a step in either table."""
    assert configs.numbers_of("3") == (3,) and configs.numbers_of("bf16") == (0,)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    options = configs.engine_arguments("drafts-auto", 0.5, {"group_size": 64}, {"self": "", "draft": ""})
    options = options["speculative_config"]
    assert options["num_speculative_tokens"] == "auto" and options["group_size"] == 64
    assert len(options["synthetic_acceptance_rates"]) == AUTO_NUMBERS[-1]
    chosen = drafting("drafts-auto", 10.0) | {"numbers": {"0": 3, "1": 1}}
    rows = [dict(BF16), chosen, drafting("held-0", 10.0), drafting("held-1", 12.0), drafting("2", 20.0)]
    end_to_end.add_derived(rows, 0.5)
    end_to_end.compare_with_fixed(rows)
    assert chosen["decode_tokens_per_s"] == pytest.approx(4 * 112.5)
    assert chosen["best_fixed"] == "held-1" and chosen["over_best_fixed"] == pytest.approx(1.125 / 1.25)
    path = tmp_path / "end_to_end-8b.json"
    path.write_text(json.dumps({"machine": {"gpu": "a GPU"}, "shape": "8b", "acceptance": 0.5, "rows": rows}))
    monkeypatch.setattr(sys, "argv", ["end_to_end_report.py", "--json", str(path)])
    monkeypatch.setattr(report, "plot", lambda *args: None)
    report.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| 32k, 4 | 400 | 500 | 450 | 0.900 (held-1) | 0: 75 %, 1: 25 % |" in lines


def test_a_held_number_takes_the_place_of_the_policy_for_a_while():
    class Policy:
        learned = 0

        def choose(self, requests, context, with_prompts=False):
            return Plan(Drafts(7))

        def observe_time(self, *seen):
            self.learned += 1

    scheduler = SimpleNamespace(draft_length=Policy())
    policy = scheduler.draft_length
    with draft_numbers(scheduler, None) as numbers:
        policy.observe_time(1, 2.0, 3, 4.0)
        assert [policy.choose(names, 9.0).drafts.number for names in (["a"], [])] == [7, 7] and numbers == [7]
    with draft_numbers(scheduler, 3) as numbers:
        policy.observe_time(1, 2.0, 3, 4.0)
        plans = policy.choose(["a"], 9.0, True), policy.choose([], 9.0)
        assert [plan.drafts.number for plan in plans] == [3, 0] and numbers == [3]
    assert policy.choose(["a"], 9.0).drafts.number == 7 and vars(policy) == {"learned": 1}


def test_derived():
    """Speed is at the expected tokens of a verification: 1 + 0.5 + 0.25 with two drafts at 0.5."""
    rows = [drafting("2", 14.0), drafting("self-2", 30.0), dict(BF16), BF16 | {"batch": 16, "config": "fp8"}]
    rows.append({"config": "bf16", "context": 32768, "batch": 16, "sequences_that_fit": 7})
    end_to_end.add_derived(rows, 0.5)
    two, itself, bf16, fp8, _ = rows
    assert two["expected_ms_per_token"] == pytest.approx(8.0)
    assert two["decode_tokens_per_s"] == pytest.approx(500.0)
    assert two["speedup"] == pytest.approx(1.25)
    assert two["tokens_to_break_even"] == pytest.approx(1.4)
    assert two["peak_gib"] == 36.0
    assert itself["speedup"] == pytest.approx(1.0) and bf16["speedup"] == 1.0
    assert "speedup" not in fp8 and fp8["decode_tokens_per_s"] == pytest.approx(1600.0)  # nothing to compare it with


def test_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(configs.ACCEPTANCE, "ngram", 0.5)
    rows = [dict(BF16), drafting("3", 20.0), drafting("5", 21.0), drafting("ngram-5", 11.0)]
    rows += [{"config": c, "context": 131072, "batch": 16, "sequences_that_fit": n} for c, n in (("bf16", 6), ("3", 13))]
    rows.append({"config": "bf16", "context": 131072, "batch": 0, "prefill_s": 10.0})
    end_to_end.add_derived(rows, 0.9)
    path = tmp_path / "end_to_end-8b.json"
    path.write_text(json.dumps({"machine": {"gpu": "a GPU"}, "shape": "8b", "acceptance": 0.9, "rows": rows}))
    monkeypatch.setattr(sys, "argv", ["end_to_end_report.py", "--json", str(path)])
    monkeypatch.setattr(report, "plot", lambda *args: None)
    report.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| 32k, 4 | 400 | 716 (1.79x, γ 5) | 892 (2.23x, γ 5) |" in lines
    assert "| 128k, 16 | 6 fit |  | 13 fit |" in lines
    assert "| 32k, 4 | 36.0 | 36.0 | 36.0 |" in lines
    assert "| 32k, 4 | 1.10, 2.45 of 6 | 2.10 of 6 |" in lines
    assert "| 32k, 4 | 1.76x | 2.23x | 2.45x | 2.65x | 2.75x |" in lines


def test_capacity_against_speed(tmp_path, capsys, monkeypatch):
    """Over BF16 in the same file: a cache of half the bytes holds twice the tokens."""
    rows = [dict(BF16), BF16 | {"config": "cache-int4", "kv_gib": 4.0, "ms_per_step": 5.0}]
    rows.append(BF16 | {"config": "fp8", "batch": 64})  # with nothing to compare it with
    end_to_end.add_derived(rows, 0.9)
    path = tmp_path / "end_to_end-8b.json"
    path.write_text(json.dumps({"machine": {"gpu": "a GPU"}, "rows": rows}))
    monkeypatch.setattr(sys, "argv", ["capacity_report.py", str(path)])
    drawn = []
    monkeypatch.setattr(capacity_report, "plot", lambda *args: drawn.append(args))
    capacity_report.main()
    assert "| 32k, 4 | cache alone, 4 bits | 4.00x | 2.00x |" in capsys.readouterr().out.splitlines()
    assert drawn[0][0] == tmp_path / "end_to_end-8b-capacity.png"
    assert drawn[0][1] == {(32768, 4): {"bf16": (1, 1), "cache-int4": (pytest.approx(4), pytest.approx(2))}}


def test_speed_against_the_budget(tmp_path, capsys, monkeypatch):
    """Time of a step from one file, accepted tokens from the other: 1 + 0.8 + 0.6 in 12 ms, and BF16 takes 10 for one."""
    rows = [dict(BF16), drafting("2", 20.0), drafting("sparse16-2", 12.0), drafting("sparse16-3", 15.0)]
    where = {"context": 32768, "temperature": 0.7, "novel": "all", "config": "drafted-2"}
    dense, sparse = {"per_position": [0.9, 0.8]}, {"draft_context": "0.0625", "draft_selection": "attention"}
    accepted = [where | dense, where | sparse | {"per_position": [0.8, 0.6]}]
    accepted.append(where | sparse | {"per_position": [0.5, 0.1], "draft_selection": "window"})
    accepted.append(where | sparse | {"per_position": [0.1, 0.1], "context": 8192})
    assert report.tokens_per_verification([0.8, 0.6], 3) == pytest.approx(1 + 0.8 + 0.6 + 0.45)
    assert report.tokens_per_verification([0.8, 0.6], 1) == pytest.approx(1.8)
    points = report.speed_by_budget(rows, accepted[:-1])[32768, 4]
    assert points["attention"] == [(1 / 16, pytest.approx(2.0)), (1.0, pytest.approx(1.35))]
    assert points["window"] == [(1 / 16, pytest.approx(1.6 / 1.2)), (1.0, pytest.approx(1.35))]
    assert points["snapkv"] == [(1.0, pytest.approx(1.35))]
    end_to_end.add_derived(rows, 0.9)
    path = tmp_path / "end_to_end-8b-sparse.json"
    path.write_text(json.dumps({"machine": {"gpu": "a GPU"}, "shape": "8b", "acceptance": 0.9, "rows": rows}))
    other = tmp_path / "accepted.json"
    monkeypatch.setattr(sys, "argv", ["report", "--json", str(path), "--sparse-acceptance", str(other)])
    monkeypatch.setattr(report, "plot", lambda *args: None)
    report.main()
    said = capsys.readouterr().out
    assert "is not there: no plot" in said and "QuantSpec, 1/16 read" in said
    other.write_text(json.dumps({"rows": accepted}))
    if find_spec("matplotlib"):
        report.main()
        assert path.with_name("end_to_end-8b-sparse-budget.png").exists()


def test_tokenizer_of_random_weights(tmp_path):
    from transformers import AutoTokenizer

    serve_bench.write_model(tmp_path, model_shapes.model_config("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = [17, 3, 3, 511]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "<17><3><3><511>"
    assert tokenizer.encode("<17><3><3><511>", add_special_tokens=False) == tokens


@pytest.mark.parametrize(
    ("shape", "billions"), [("8b", 8.03), ("7b", 6.74), ("qwen2.5-7b", 7.6), ("qwen3-32b", 32.8), ("qwen3-30b-a3b", 30.5)]
)
def test_shapes_are_those_of_the_models_they_name(shape, billions):
    assert estimate.model_from(model_shapes.model_config(shape), shape).weights / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_shape_from_a_configuration(tmp_path):
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "max_position_embeddings": 40}))
    for given in (str(folder), str(folder / "config.json")):
        assert model_shapes.model_config(given) == {"model_type": "qwen2", "max_position_embeddings": 1 << 20}
        assert model_shapes.shape_name(given) == "some-model"
    assert model_shapes.shape_name("qwen3-32b") == "qwen3-32b"
    with pytest.raises(ValueError, match="neither one of 8b, "):
        model_shapes.model_config(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--shape", "9b"], "--shape 9b: neither"),
        (["--shape", "qwen3-32b", "--configs", "draft-5"], "which there is for 8b"),
        (["--configs", "held-3"], "held-3 is no configuration but a row of drafts-auto"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments, what, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", *arguments])
    with pytest.raises(SystemExit):
        end_to_end.main()
    assert what in capsys.readouterr().err
