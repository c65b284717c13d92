"""Drafts with 8-bit weights, all or those that lose most in 4: nearer to the target, within the bits asked for."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_draft_model import build, cache_root, run, runner  # noqa: F401  fixtures

from vllm_quantspec.integration.draft import build as draft_build
from vllm_quantspec.integration.draft import choose_bits, losses, rounding, stored
from vllm_quantspec.integration.draft import model as draft_model
from vllm_quantspec.integration.draft.loaded import effective_weight
from vllm_quantspec.weights import quantize_weight


def widths(draft) -> dict[str, int]:
    methods = {name: getattr(draft.model.get_submodule(name), "quant_method", None) for name in draft.quantized}
    return {name: getattr(method, "bits", 4) for name, method in methods.items()}  # the head's method wraps its own


def average(draft) -> float:
    """Bits per weight of all linears but the output layer, as their groups of 128 make them."""
    sizes = {n: draft.model.get_submodule(n) for n in draft.quantized if n != "lm_head"}
    sizes = {n: m.input_size * m.output_size for n, m in sizes.items()}
    return sum((bits + 0.25) * sizes[n] for n, bits in widths(draft).items() if n != "lm_head") / sum(sizes.values())


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    """Losses of few tokens: enough to tell linears apart."""
    monkeypatch.setattr(losses, "TEXTS", 4)
    monkeypatch.setattr(losses, "LENGTH", 24)


@pytest.fixture
def again(runner, build):  # noqa: F811
    """`build`, as often as one likes."""
    layers = runner.vllm_config.compilation_config.static_forward_context
    before = dict(layers)

    def start(**options):
        for name in layers.keys() - before.keys():
            del layers[name]
        return build(**options)

    return start


def test_all_linears_but_the_output_layer_have_8_bits(runner, again):  # noqa: F811
    draft = again(draft_weights="int8")
    assert {name for name, bits in widths(draft).items() if bits == 4} == {"lm_head"} and len(draft.quantized) == 21
    name = "model.layers.2.mlp.down_proj"
    weight, _ = effective_weight(runner.get_model().get_submodule(name), torch.bfloat16)
    applied, _ = effective_weight(draft.model.get_submodule(name), torch.bfloat16)
    expected = quantize_weight(weight, rotated=True, bits=8).dequantize()
    assert (applied.float() - expected).norm() < 0.005 * expected.norm()
    narrow = again()
    assert draft.int4_bytes > 1.3 * narrow.int4_bytes and (draft.wide_share, narrow.wide_share) == (1, 0)
    some = again(draft_weights="mixed", weight_bits=6.0)
    assert average(some) == pytest.approx(4.25 + 4 * some.wide_share)


def test_the_more_bits_the_nearer_to_the_target(runner, again, books_4m, passage, monkeypatch):  # noqa: F811
    from transformers import AutoTokenizer

    token_ids = torch.tensor(AutoTokenizer.from_pretrained(books_4m).encode(passage)[:600], dtype=torch.int32)
    target = run(runner, runner.get_model(), token_ids, monkeypatch)[0].log_softmax(-1)

    def divergence(draft) -> float:
        proposal = run(runner, draft.model, token_ids, monkeypatch)[0].log_softmax(-1)
        return (target.exp() * (target - proposal)).sum(-1).mean().item()

    int4, int8 = divergence(again()), divergence(again(draft_weights="int8"))
    draft = again(draft_weights="mixed", weight_bits=6.0)
    assert {4, 8} == {bits for name, bits in widths(draft).items() if name != "lm_head"} and 5.5 < average(draft) <= 6.0
    mixed = divergence(draft)
    assert 0 < int8 < 0.2 * int4 and int8 < mixed < 0.75 * int4


def test_a_loss_is_what_the_model_loses_with_this_linear_alone_in_4_bits(runner, again, monkeypatch):  # noqa: F811
    """By another way: the weight is written into the target. And afterwards the target is what it was."""
    measured = {}
    measure = losses.measure_losses
    monkeypatch.setattr(choose_bits, "measure_losses", lambda *args: measured.update(measure(*args)) or measured)
    target = runner.get_model()
    method = target.model.layers[1].mlp.down_proj.quant_method
    draft = again(draft_weights="mixed", weight_bits=6.0, weight_rotation="none")
    assert len(measured) == 20 and "lm_head" not in measured and all(loss > 0 for loss in measured.values())
    # In their measure, as they add up to what all lose together.
    assert target.model.layers[1].mlp.down_proj.quant_method is method
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in target.modules())
    name = max(measured, key=measured.get)
    assert widths(draft)[name] == 8
    texts = losses.Texts(runner.vllm_config, target, losses.TEXTS, losses.LENGTH, "a test")
    narrow = {}
    apply = type(method).apply
    monkeypatch.setattr(type(method), "apply", lambda self, m, x, bias=None: (
        torch.nn.functional.linear(x, narrow[m], bias) if m in narrow else apply(self, m, x, bias)
    ))  # fmt: skip

    def loss(*names: str) -> float:
        layers = [target.get_submodule(name) for name in names]
        narrow.clear()
        with texts:
            exact = torch.cat([target.compute_logits(x) for x in texts.forward()]).float().log_softmax(-1)
            weights = (effective_weight(x, torch.bfloat16)[0] for x in layers)
            narrow.update((x, quantize_weight(w).dequantize().bfloat16()) for x, w in zip(layers, weights, strict=True))
            other = torch.cat([target.compute_logits(x) for x in texts.forward()]).float().log_softmax(-1)
        return (exact.exp() * (exact - other)).sum(-1).mean().item()

    together = loss(*measured)
    assert sum(measured.values()) == pytest.approx(together, rel=0.1)
    least = min(measured, key=measured.get)
    assert measured[name] / measured[least] == pytest.approx(loss(name) / loss(least), rel=0.3)


@pytest.mark.parametrize("how", ["search", "gptq"])
def test_losses_and_weights_are_kept_for_the_next_start(runner, again, cache_root, how, monkeypatch):  # noqa: F811
    calls = []
    measure, calibrate = choose_bits.measure_losses, rounding.calibrate
    monkeypatch.setattr(choose_bits, "measure_losses", lambda *args: calls.append("losses") or measure(*args))
    monkeypatch.setattr(rounding, "calibrate", lambda *args: calls.append("moments") or calibrate(*args))

    def start(**options) -> tuple[dict, dict]:
        draft = again(**{"draft_weights": "mixed", "weight_rounding": how, "weight_bits": 6.0} | options)
        return widths(draft), {n: p.clone() for n, p in draft.model.named_parameters() if "int4" in n}

    once = ["moments"] * (how == "gptq") + ["losses"]  # of the weights as they are rounded
    first, weights = start()
    assert calls == once
    second, same = start()
    assert calls == once and second == first
    assert same.keys() == weights.keys() and all(torch.equal(same[name], weights[name]) for name in weights)
    # Another budget needs nothing new, nor do 4 bits alone.
    more, _ = start(weight_bits=7.0)
    assert {n for n, bits in more.items() if bits == 8} > {n for n, bits in first.items() if bits == 8}
    start(draft_weights="int4", weight_bits=None)
    assert calls == once
    (file,) = cache_root.rglob("losses.json")
    content, warnings = file.read_text(), []
    monkeypatch.setattr(stored.logger, "warning", lambda message, *values: warnings.append(message % values))
    foreign = json.dumps(json.loads(content) | {"quantspec": "another model"})
    for damaged in (content[:-9], "", "[]", foreign):
        file.write_text(damaged)
        assert start()[0] == first and "measured again" in warnings[-1]
        assert file.read_text() == content
    assert len(warnings) == 4


def test_auto_is_what_the_cost_model_finds_faster(runner, again, monkeypatch):  # noqa: F811
    found, wanted = [], [0.0]

    def speed(model, bandwidth, context, batch, *args, wide_share, **options):
        found.append((context, batch, wide_share))
        return type("Speed", (), {"quantspec": abs(wide_share - wanted[0]), "draft_share": 1})

    monkeypatch.setattr(choose_bits.estimate, "speed", speed)
    monkeypatch.setattr(runner.vllm_config, "speculative_config", QUANTSPEC)
    for wanted[0], kind in ((0.0, {4}), (0.5, {4, 8}), (1.0, {8})):
        draft = again(draft_weights="auto")
        assert {bits for name, bits in widths(draft).items() if name != "lm_head"} == kind
    assert set(found[0][:2]) == {1024, 1} and max(share for *_, share in found) == 1
    wanted[0] = 0.0
    assert 8 in widths(again(draft_weights="mixed")).values()  # it has some, or it would be int4


@pytest.mark.parametrize("rounding", ["search", "gptq"])
def test_auto_gives_a_small_model_8_bits(runner, again, rounding, monkeypatch):  # noqa: F811
    monkeypatch.setattr(QUANTSPEC, "join_layers", False)  # a launch per layer is worth more, where sizes allow one
    monkeypatch.setattr(runner.vllm_config, "speculative_config", QUANTSPEC)
    said = []
    monkeypatch.setattr(choose_bits.logger, "info", lambda message, *values: said.append(message % values))
    bits = widths(again(draft_weights="auto", weight_rounding=rounding))
    assert sum(b == 8 for b in bits.values()) > 15 and bits["lm_head"] == 4
    assert "a request of 1024 tokens on an H200" in said[-1] and "all in 4 bits" in said[-1]


def test_one_launch_per_layer_counts_only_where_there_can_be_one(runner, again, monkeypatch):  # noqa: F811
    monkeypatch.setattr(runner.vllm_config, "speculative_config", QUANTSPEC)

    def wide(**options) -> int:
        return sum(bits == 8 for bits in widths(again(draft_weights="auto", **options)).values())

    assert wide(weight_rotation="none") == 0
    assert wide(weight_rotation="hadamard") > 15 and wide(weight_rotation="none", weight_group_size=64) > 15
    linears = [SimpleNamespace(methods={4: SimpleNamespace(group_size=128, rotated=False)})]
    for capability, possible in (((8, 9), False), ((9, 0), True), ((12, 0), True), (None, True)):
        platform = SimpleNamespace(get_device_capability=lambda of=capability: of)
        monkeypatch.setattr(choose_bits, "current_platform", platform)
        assert choose_bits._can_join_layers(linears, torch.nn.Linear(2, 2)) == possible
    monkeypatch.setattr(choose_bits, "is_shared", lambda module: isinstance(module, torch.nn.Linear))
    assert not choose_bits._can_join_layers(linears, torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_bits_are_chosen_by_default_where_gptq_runs_unasked(runner, monkeypatch):  # noqa: F811
    built = []
    monkeypatch.setattr(draft_build, "build_draft_model", lambda *args, **o: built.append(o) or draft_model.DraftModel())
    config = type("Config", (QUANTSPEC,), {
        "draft_weights": "int4", "weight_rounding": "auto", "weight_group_size": 128, "weight_rotation": "none",
        "draft_activations": "model",
        "weight_bits": None, "asked_for": (),
    })  # fmt: skip
    monkeypatch.setattr(runner.vllm_config, "speculative_config", config)

    def weights(settled: str, **more) -> tuple[str, bool]:
        monkeypatch.setattr(draft_build, "settle_rounding", lambda *args: settled)
        for name, value in ({"weight_rounding": "auto", "asked_for": ()} | more).items():
            monkeypatch.setattr(config, name, value)
        draft_build.build_configured_draft(runner.vllm_config, runner.get_model())
        return built[-1]["draft_weights"], built[-1]["weights_asked"]

    assert weights("gptq") == ("auto", False)
    assert weights("search") == ("int4", False)
    assert weights("gptq", asked_for=("draft_weights",)) == ("int4", True)
    assert weights("gptq", weight_rounding="gptq", asked_for=("weight_rounding",)) == ("int4", False)


def test_a_default_that_gptq_fails_for_measures_nothing(runner, again, monkeypatch):  # noqa: F811
    def fail(*args):
        raise RuntimeError("no texts")

    monkeypatch.setattr(rounding, "calibrate", fail)
    monkeypatch.setattr(choose_bits, "measure_losses", fail)
    draft = again(draft_weights="auto", weights_asked=False, weight_rounding="gptq", gptq_asked=False)
    assert set(widths(draft).values()) == {4}


@pytest.mark.parametrize("asked", [False, True])
def test_a_default_whose_losses_cannot_be_measured_has_4_bits(runner, again, asked, monkeypatch):  # noqa: F811
    def fail(*args):
        raise RuntimeError("no room")

    said = []
    monkeypatch.setattr(draft_model.logger, "warning", lambda message, *values: said.append(message % values))
    monkeypatch.setattr(choose_bits, "measure_losses", fail)
    options = {"draft_weights": "auto", "weights_asked": asked, "weight_rounding": "gptq", "gptq_asked": False}
    if asked:
        with pytest.raises(RuntimeError, match="no room"):
            again(**options)
    else:
        assert set(widths(again(**options)).values()) == {4} and any("no room" in line for line in said)


QUANTSPEC = type("Config", (), {
    "group_size": 128, "num_speculative_tokens": 4, "quantize_lm_head": True, "join_layers": True, "fuse_layers": False,
    "draft_context": "all", "draft_experts": "target", "draft_sample_method": "greedy", "chooses_number": False,
})  # fmt: skip


def test_new_weights_of_the_target_are_rounded_to_the_same_bits(runner, again):  # noqa: F811
    draft = again(draft_weights="mixed", weight_bits=6.0)
    name = next(name for name, bits in widths(draft).items() if bits == 8)
    before = {n: p.clone() for n, p in draft.model.get_submodule(name).named_parameters()}
    for update in draft.updates:
        update()
    assert widths(draft)[name] == 8
    assert all(torch.equal(p, before[n]) for n, p in draft.model.get_submodule(name).named_parameters())
