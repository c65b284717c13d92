"""The draft model: INT4 linears against their dequantized weights, and what it shares with a loaded target."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

vllm = pytest.importorskip("vllm")

from vllm.forward_context import set_forward_context  # noqa: E402
from vllm.model_executor.layers.linear import LinearBase  # noqa: E402

from vllm_quantspec.integration.draft import build as draft_build  # noqa: E402
from vllm_quantspec.integration.draft import calibration, linears, own_linear, rounding, stored  # noqa: E402
from vllm_quantspec.integration.draft.build import build_draft_model  # noqa: E402
from vllm_quantspec.integration.draft.linears import choose_int4_method, int4_bytes  # noqa: E402
from vllm_quantspec.integration.draft.loaded import effective_weight, local_shape  # noqa: E402
from vllm_quantspec.integration.draft.model import DRAFT_PREFIX  # noqa: E402
from vllm_quantspec.kernels import int4_linear, rescore_logits  # noqa: E402
from vllm_quantspec.kernels.int4_linear_fp8 import split  # noqa: E402
from vllm_quantspec.rotation import rotate_weight  # noqa: E402
from vllm_quantspec.weights import quantize_weight  # noqa: E402


@pytest.fixture(scope="module")
def runner(books_4m):
    llm = vllm.LLM(books_4m, enforce_eager=True, max_model_len=2048)
    yield llm.llm_engine.collective_rpc(lambda worker: worker.model_runner)[0]
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(autouse=True)
def cache_root(tmp_path, monkeypatch):
    """Rounded weights that a test keeps are its own."""
    monkeypatch.setattr("vllm.envs.VLLM_CACHE_ROOT", str(tmp_path), raising=False)
    return tmp_path


@pytest.fixture
def build(runner):
    """build_draft_model on the engine's model, inputs rotated; what it registers is taken out afterwards."""
    layers = runner.vllm_config.compilation_config.static_forward_context
    before = dict(layers)
    rotated = {"weight_rotation": "hadamard"}
    yield lambda **options: build_draft_model(runner.vllm_config, runner.get_model(), **rotated | options)
    for name in layers.keys() - before.keys():
        del layers[name]


def causal_attention(layer: torch.nn.Module, calls: list[str]):
    """An attention implementation without a KV cache, which notes for which layer it was called."""
    repeat = layer.num_heads // layer.num_kv_heads

    def forward(called, query, key, value, kv_cache, metadata, output, **unused):
        calls.append(called.layer_name)
        q, k, v = (t.view(len(query), -1, layer.head_size).transpose(0, 1) for t in (query, key, value))
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        result = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.impl.scale)
        output.view(len(query), -1, layer.head_size).copy_(result.transpose(0, 1))
        return output

    return forward


def run(runner, model: torch.nn.Module, token_ids: torch.Tensor, monkeypatch) -> tuple[torch.Tensor, list[str]]:
    """Logits [tokens, vocabulary] of ``model``, and the names of the attention layers it called."""
    calls: list[str] = []
    for layer in runner.vllm_config.compilation_config.static_forward_context.values():
        if hasattr(layer, "impl"):  # layers of experts have none
            monkeypatch.setattr(layer.impl, "forward", causal_attention(layer, calls))
    positions = torch.arange(len(token_ids))
    with torch.inference_mode(), set_forward_context(None, runner.vllm_config, num_tokens=len(token_ids)):
        hidden_states = model(input_ids=token_ids, positions=positions, inputs_embeds=None)
        return model.compute_logits(hidden_states).float(), calls


@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize(
    "in_features, out_features, group_size", [(256, 512, 128), (640, 256, 128), (320, 96, 64), (96, 64, 32), (128, 64, 128)]
)
@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("rotated", [False, True])
def test_int4_linear(runner, monkeypatch, in_features, out_features, group_size, tokens, int8_activations, rotated):
    monkeypatch.setattr("vllm.envs.VLLM_CPU_INT4_W4A8", int8_activations, raising=False)
    generator = torch.Generator().manual_seed(in_features + tokens)
    weight = (torch.randn(out_features, in_features, generator=generator) * 0.05).bfloat16()
    bias = torch.randn(out_features, generator=generator).bfloat16()
    x = torch.randn(tokens, in_features, generator=generator).bfloat16()
    quantized = quantize_weight(weight, group_size, rotated=rotated)
    method, reason = choose_int4_method(in_features, out_features, torch.bfloat16, 128, rotated)
    assert method is not None, reason
    assert method.group_size == group_size
    layer = torch.nn.Module()
    layer.register_parameter("bias", torch.nn.Parameter(bias.clone(), requires_grad=False))
    method.install(layer, quantized)
    expected = F.linear(x.float(), quantized.dequantize(), bias.float())
    error = (method.apply(layer, x, layer.bias).float() - expected).norm() / expected.norm()
    assert error < (0.02 if int8_activations else 0.005)
    assert int4_bytes(layer) < 0.4 * weight.nbytes


@pytest.mark.parametrize("bits, most", [(4, int4_linear.MAX_FASTER_TOKENS), (8, int4_linear.MAX_NARROW)])
def test_the_gpus_linear_takes_the_targets_weight_for_many_rows_unless_told_otherwise(runner, monkeypatch, bits, most):
    """The GPU's method, on the operator's CPU twin."""
    platform = SimpleNamespace(get_device_capability=lambda: SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(linears, "current_platform", platform)
    weight = (torch.randn(64, 256, generator=torch.Generator().manual_seed(3)) * 0.05).bfloat16()
    quantized = quantize_weight(weight, 128, bits=bits, method="nearest")
    method = (linears.FastInt4LinearMethod if bits == 4 else linears.FastInt8LinearMethod)(256, 64, torch.bfloat16, 128)
    layer = torch.nn.Module()
    method.install(layer, quantized, weight)
    assert int4_bytes(layer) == 64 * 256 * bits // 8 + 64 * 2 * 4
    for rows in (1, most, most + 1):
        x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)).bfloat16()
        exact, own = F.linear(x, weight), F.linear(x.float(), quantized.dequantize()).bfloat16()
        torch.testing.assert_close(method.apply(layer, x), own if rows <= most else exact, rtol=0.01, atol=2e-3)
        torch.testing.assert_close(method.apply_own(layer, x), own, rtol=0.01, atol=2e-3)
    with pytest.raises(ValueError, match="bits"):
        method.install(layer, quantize_weight(weight, 128, bits=12 - bits))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 20])
def test_inputs_in_fp8(runner, dtype, rows, rotated):
    """On a CPU of any number of tokens; in float32 on this package's kernel, in 16 bits on vLLM's where it has one."""
    generator = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(64, 256, generator=generator) * 0.05, torch.randn(rows, 256, generator=generator)
    weight, x = weight.to(dtype), (x * torch.logspace(-2, 2, 256)).to(dtype)
    quantized = quantize_weight(weight, 128, scale_dtype=dtype, rotated=rotated)
    method, reason = choose_int4_method(256, 64, dtype, 128, rotated, fp8_inputs=True)
    assert method is not None, reason
    layer = torch.nn.Module()
    method.install(layer, quantized)
    out = method.apply(layer, x.unsqueeze(0)).squeeze(0).float()
    rounded = split(linears.rotate(x) if rotated else x, 1)
    if rotated:  # back to what the weight is dequantized for: the inverse of an input's rotation is a weight's
        rounded = rotate_weight(rounded)
    expected, exact = (F.linear(inputs, quantized.dequantize()) for inputs in (rounded, x.float()))
    assert (out - expected).norm() < 0.006 * expected.norm()
    assert 0.01 * exact.norm() < (expected - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("rows", [8, 9, 64, 65])
def test_a_gpus_linear_rounds_inputs_where_that_is_faster(runner, monkeypatch, rows):
    """From 9 to 64 tokens, on the operator's CPU twin."""
    platform = SimpleNamespace(get_device_capability=lambda: SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(linears, "current_platform", platform)
    generator = torch.Generator().manual_seed(rows)
    weight = (torch.randn(64, 256, generator=generator) * 0.05).bfloat16()
    x = torch.randn(rows, 256, generator=generator).bfloat16()
    quantized = quantize_weight(weight, 128)
    method = linears.FastInt4LinearMethod(256, 64, torch.bfloat16, 128, fp8_inputs=True)
    layer = torch.nn.Module()
    method.install(layer, quantized)
    expected = F.linear(split(x, 1) if 9 <= rows <= 64 else x.float(), quantized.dequantize())
    out = method.apply(layer, x).float()
    assert (out - expected).norm() < 0.005 * expected.norm()


def test_shapes_without_a_kernel_say_why(runner):
    for in_features, out_features, why in ((100, 64, "divisible"), (128, 40, "40")):
        method, reason = choose_int4_method(in_features, out_features, torch.bfloat16, 128)
        assert method is None
        assert why in reason
    method, reason = choose_int4_method(128, 64, torch.float64, 128)
    assert method is None
    assert "float64" in reason


def test_a_rotated_weight_does_not_fit_a_linear_that_does_not_rotate(runner):
    method, _ = choose_int4_method(128, 64, torch.bfloat16, 128)
    with pytest.raises(ValueError, match="rotated"):
        method.install(torch.nn.Module(), quantize_weight(torch.randn(64, 128).bfloat16(), 128, rotated=True))


@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize("rotated", [False, True])
def test_int4_linear_in_float32(runner, tokens, rotated):
    """No kernel of vLLM's takes float32: this package's does."""
    weight, x = torch.randn(64, 128) * 0.05, torch.randn(tokens, 128)
    method, reason = choose_int4_method(128, 64, torch.float32, 128, rotated)
    assert method is not None, reason
    layer = torch.nn.Module()
    quantized = quantize_weight(weight, 128, scale_dtype=torch.float32, rotated=rotated)
    method.install(layer, quantized)
    assert torch.allclose(method.apply(layer, x), F.linear(x, quantized.dequantize()), rtol=1e-4, atol=1e-5)


def test_shares_everything_but_the_linears(runner, build):
    target = runner.get_model()
    before = {name: p.data_ptr() for name, p in target.named_parameters()}
    draft = build()
    linears = {n: m for n, m in target.named_modules() if isinstance(m, LinearBase)}
    assert set(draft.quantized) == {*linears, "lm_head"}
    assert not draft.shared
    assert {name: p.data_ptr() for name, p in target.named_parameters()} == before
    own = {name: p for name, p in draft.model.named_parameters() if "int4" in name}
    targets = dict([*target.named_parameters(), *target.named_buffers()])
    others = dict([*draft.model.named_parameters(), *draft.model.named_buffers()])
    assert others.keys() - own.keys() <= targets.keys()
    assert all(others[name].data_ptr() == targets[name].data_ptr() for name in others.keys() - own.keys())
    assert draft.model.model.embed_tokens is target.model.embed_tokens
    assert draft.model.model.norm is target.model.norm
    assert draft.int4_bytes == sum(p.numel() * p.element_size() for p in own.values())
    assert draft.int4_bytes < 0.3 * draft.target_bytes
    head = target.lm_head.weight.nbytes
    assert draft.target_bytes == head + sum(2 * m.input_size * m.output_size for m in linears.values())


def test_attention_layers_read_the_targets_cache(runner, build):
    layers = runner.vllm_config.compilation_config.static_forward_context
    targets = dict(layers)
    draft = build()
    assert draft.attention_layers == {DRAFT_PREFIX + name: name for name in targets}
    for name, target_name in draft.attention_layers.items():
        layer, target = layers[name], layers[target_name]
        assert layer is not target
        assert layer.layer_name == name
        assert layer.impl is not target.impl
        assert layer.kv_sharing_target_layer_name == layer.impl.kv_sharing_target_layer_name == target_name
        assert target.layer_name == target_name
        assert target.kv_sharing_target_layer_name is target.impl.kv_sharing_target_layer_name is None
    names = {m.layer_name for m in draft.model.modules() if hasattr(m, "layer_name")}
    assert names == set(draft.attention_layers)


def test_linears_apply_the_dequantized_weight(runner, build):
    draft = build()
    for name in draft.quantized:
        if name == "lm_head":
            continue
        weight, _ = effective_weight(runner.get_model().get_submodule(name), torch.bfloat16)
        linear = draft.model.get_submodule(name)
        applied, _ = effective_weight(linear, torch.bfloat16)
        expected = quantize_weight(weight, linear.quant_method.group_size, rotated=True).dequantize()
        assert (applied.float() - expected).norm() < 0.005 * expected.norm()
        assert (applied.float() - weight.float()).norm() < 0.15 * weight.float().norm()


def test_the_output_layer_makes_its_largest_logits_exact(runner, build):
    target, draft = runner.get_model(), build()
    assert draft.model.lm_head is not target.lm_head
    assert draft.model.model.embed_tokens is target.model.embed_tokens
    x = torch.randn(40, target.config.hidden_size, generator=torch.Generator().manual_seed(3)).bfloat16()
    exact, logits = target.compute_logits(x).float(), draft.model.compute_logits(x).float()
    head = draft.model.lm_head.quant_method
    int4 = head.linear.apply(draft.model.lm_head, x).float()
    assert 0.03 < (int4 - exact).norm() / exact.norm() < 0.15
    assert (int4.argmax(-1) == exact.argmax(-1)).float().mean() < 0.9
    assert (logits.argmax(-1) == exact.argmax(-1)).float().mean() > 0.97
    assert torch.equal(logits, rescore_logits.reference(int4.bfloat16(), x, target.lm_head.weight).float())


@pytest.mark.parametrize("reason", ["quantize_lm_head", "dtype", "quantized"])
def test_the_output_layer_is_the_targets_where_asked_or_needed(runner, build, monkeypatch, reason):
    head = runner.get_model().lm_head
    if reason == "dtype":
        monkeypatch.setattr(type(runner.vllm_config.model_config), "head_dtype", torch.float32)
    elif reason == "quantized":
        monkeypatch.setattr(head, "quant_method", object())
    draft = build(quantize_lm_head=reason != "quantize_lm_head")
    assert draft.model.lm_head is head and reason in draft.shared["lm_head"]


def test_moments_choose_gptq(runner, build, monkeypatch):
    """A linear that the texts come by is rounded by its moments, another one by search."""
    inputs = torch.randn(512, 640, generator=torch.Generator().manual_seed(9)) * torch.linspace(0.1, 2, 640)
    moments = inputs.T @ inputs / len(inputs)
    name, other = "model.layers.3.mlp.down_proj", "model.layers.2.mlp.down_proj"
    reached = runner.get_model().get_submodule(name)
    monkeypatch.setattr(rounding, "calibrate", lambda config, model, linears: linears[reached](moments))
    draft = build(weight_rounding="gptq")
    for linear in (name, other):
        weight, _ = effective_weight(runner.get_model().get_submodule(linear), torch.bfloat16)
        applied, _ = effective_weight(draft.model.get_submodule(linear), torch.bfloat16)
        gptq = quantize_weight(weight, method="gptq", second_moments=moments, rotated=True).dequantize()
        search = quantize_weight(weight, rotated=True).dequantize()
        expected, unexpected = (gptq, search) if linear == name else (search, gptq)
        assert (applied.float() - expected).norm() < 0.005 * expected.norm()
        assert (applied.float() - unexpected).norm() > 0.02 * unexpected.norm()


def test_moments_are_of_texts_that_the_model_writes(runner, monkeypatch):
    model = runner.get_model()
    names = ("model.layers.0.self_attn.qkv_proj", "model.layers.3.mlp.down_proj", "model.layers.4.self_attn.o_proj")
    linears = {name: model.get_submodule(name) for name in names}
    moments: dict[str, torch.Tensor] = {}
    takes = {linear: lambda m, name=name: moments.update({name: m}) for name, linear in linears.items()}
    texts = calibration.calibrate(runner.vllm_config, model, takes, texts=8, length=64)
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())

    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].float()))
        for name, linear in linears.items()
    ]
    surprise = []
    for text in texts:
        logits, _ = run(runner, model, text, monkeypatch)
        p = logits.log_softmax(-1)[:-1]
        surprise.append(p.gather(1, text[1:, None].long())[:, 0] - (p.exp() * p).sum(-1))
    for handle in handles:
        handle.remove()
    for name in names:
        x = torch.cat(seen[name])
        assert x.shape[0] == texts.numel()
        assert (moments[name] - x.T @ x / len(x)).norm() < 0.02 * moments[name].norm()
    assert torch.cat(surprise).mean().abs() < 0.4  # nats: a sampled token is as likely as tokens are on average


def test_the_model_is_given_contiguous_ids(runner, monkeypatch):
    """vLLM's embedding refuses others where ranks share the vocabulary: texts are written a column at a time."""
    model, given = runner.get_model(), []
    forward = type(model).forward

    def noting(self, input_ids, *args, **kwargs):
        given.append(input_ids.is_contiguous())
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", noting)
    linear = next(m for name, m in model.named_modules() if name.endswith("o_proj"))
    calibration.calibrate(runner.vllm_config, model, {linear: lambda moments: None}, texts=3, length=6)
    assert len(given) > 5 and all(given)


def test_a_forward_pass_has_no_more_tokens_than_a_step_of_the_engine(runner, monkeypatch):
    """Moments that are added up over parts of texts, some linears at a time, are those of all texts at once."""
    model = runner.get_model()
    linears = {name: module for name, module in model.named_modules() if name.endswith("proj")}

    def moments() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        found = {}
        takes = {linear: lambda m, name=name: found.update({name: m}) for name, linear in linears.items()}
        return calibration.calibrate(runner.vllm_config, model, takes, texts=6, length=40), found

    most = []
    forward = calibration._Forward.__call__
    monkeypatch.setattr(
        calibration._Forward, "__call__", lambda self, ids, *at: most.append(ids.numel()) or forward(self, ids, *at)
    )
    texts, whole = moments()
    assert max(most) == 240
    monkeypatch.setattr(calibration, "MOMENTS", 3 * 4 * 256**2)
    for limit, longest in ((100, 80), (16, 16)):
        monkeypatch.setattr(runner.vllm_config.scheduler_config, "max_num_batched_tokens", limit)
        most.clear()
        same, parts = moments()
        assert max(most) == longest and torch.equal(same, texts)
        assert parts.keys() == whole.keys() == linears.keys()
        for name, m in whole.items():
            assert (parts[name] - m).norm() < 0.01 * m.norm()


def test_what_gptq_has_rounded_is_kept(runner, build, cache_root, monkeypatch, caplog):
    """The next start reads it; another one that differs, or a file that is damaged, rounds again."""
    calls, layers = [], runner.vllm_config.compilation_config.static_forward_context
    before = dict(layers)

    def calibrate(config, model, linears):
        calls.append(len(linears))
        for linear, take in list(linears.items()):
            if hasattr(linear, "input_size_per_partition") or hasattr(linear, "input_size"):
                take(torch.eye(linear.weight.shape[1] if linear.weight.dim() == 2 else linear.input_size))

    def start(**options) -> dict[str, torch.Tensor]:
        for name in layers.keys() - before.keys():
            del layers[name]
        draft = build(**{"weight_rounding": "gptq"} | options)
        return {n: p.clone() for n, p in draft.model.named_parameters() if "int4" in n}

    monkeypatch.setattr(rounding, "calibrate", calibrate)
    first = start()
    (file,) = cache_root.rglob("*.safetensors")
    content = file.read_bytes()
    again = start()
    assert calls == [21] and first.keys() == again.keys()
    assert all(torch.equal(first[n], again[n]) for n in first)
    start(weight_rotation="none")
    assert len(calls) == 2 and len(list(cache_root.rglob("*.safetensors"))) == 2
    warnings = []
    monkeypatch.setattr(stored.logger, "warning", lambda message, *values: warnings.append(message % values))
    foreign = content.replace(b'"ranks', b'"tanks').replace(b'\\"ranks', b'\\"tanks')
    for damaged in (content[:-5], content[:50], b"", b"x" * 1000, foreign):
        file.write_bytes(damaged)
        number = len(calls)
        start()
        assert len(calls) == number + 1 and "made again" in warnings[-1] and len(warnings) == number - 1
        assert file.read_bytes() == content and len(list(cache_root.rglob("*"))) == 5  # two folders in one, a file in each
    weight = runner.get_model().model.norm.weight
    weight.data[7] += 0.25
    start()
    weight.data[7] -= 0.25
    assert len(calls) == 8 and len(warnings) == 5


def test_a_disk_that_fails_costs_the_file_only(runner, build, cache_root, monkeypatch):
    (cache_root / "quantspec").write_text("a file where a folder is to be")
    warnings = []
    monkeypatch.setattr(stored.logger, "warning", lambda message, *values: warnings.append(message % values))
    monkeypatch.setattr(rounding, "calibrate", lambda config, model, linears: None)
    assert len(build(weight_rounding="gptq").quantized) == 21
    assert len(warnings) == 1 and "cannot be kept" in warnings[0]


def test_an_interrupted_start_leaves_nothing(runner, build, cache_root, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(rounding, "calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(weight_rounding="gptq")
    assert not [path for path in cache_root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("asked", [False, True])
def test_a_model_for_which_gptq_fails(runner, build, cache_root, monkeypatch, asked):
    """By default the engine starts all the same."""

    def fails(config, model, linears):
        first = next(iter(linears))
        linears[first](torch.eye(local_shape(first)[0]))
        raise RuntimeError("no forward pass\nfor you")

    warnings = []
    monkeypatch.setattr(rounding.logger, "warning", lambda message, *values: warnings.append(message % values))
    monkeypatch.setattr(rounding, "calibrate", fails)
    if asked:
        with pytest.raises(RuntimeError, match="no forward pass"):
            build(weight_rounding="gptq")
        return
    draft = build(weight_rounding="gptq", gptq_asked=False)
    (warning,) = (text for text in warnings if "GPTQ" in text)
    assert "by search: RuntimeError: no forward pass for you" in warning
    assert not [path for path in cache_root.rglob("*") if path.is_file()]
    for name in draft.quantized:
        weight, _ = effective_weight(runner.get_model().get_submodule(name), torch.bfloat16)
        applied, _ = effective_weight(draft.model.get_submodule(name), torch.bfloat16)
        assert (applied.float() - weight.float()).norm() < 0.2 * weight.float().norm()


def test_moments_that_gptq_cannot_use(runner, build, monkeypatch):
    warnings = []
    monkeypatch.setattr(own_linear.logger, "warning", lambda message, *values: warnings.append(message % values))
    name = "model.layers.3.mlp.down_proj"
    reached = runner.get_model().get_submodule(name)
    monkeypatch.setattr(rounding, "calibrate", lambda config, model, all: all[reached](torch.zeros(640, 640)))
    draft = build(weight_rounding="gptq")
    assert len(warnings) == 1 and name in warnings[0] and "search" in warnings[0]
    weight, _ = effective_weight(reached, torch.bfloat16)
    applied, _ = effective_weight(draft.model.get_submodule(name), torch.bfloat16)
    expected = quantize_weight(weight, rotated=True).dequantize()
    assert (applied.float() - expected).norm() < 0.005 * expected.norm()


def test_gptq_drafts_are_nearer_to_the_target(runner, build, books_4m, passage, monkeypatch):
    from transformers import AutoTokenizer

    token_ids = torch.tensor(AutoTokenizer.from_pretrained(books_4m).encode(passage)[:600], dtype=torch.int32)
    target = run(runner, runner.get_model(), token_ids, monkeypatch)[0].log_softmax(-1)
    divergences = []
    for weight_rounding in ("search", "gptq"):
        draft = build(weight_rounding=weight_rounding)
        assert len(draft.quantized) == 21 and not draft.shared
        proposal = run(runner, draft.model, token_ids, monkeypatch)[0].log_softmax(-1)
        divergences.append((target.exp() * (target - proposal)).sum(-1).mean())
        for name in draft.attention_layers:
            del runner.vllm_config.compilation_config.static_forward_context[name]
    assert 0 < divergences[1] < 0.85 * divergences[0]


def test_runs_beside_the_target(runner, build, monkeypatch):
    draft = build()
    token_ids = torch.randint(0, 4096, (200,), generator=torch.Generator().manual_seed(7), dtype=torch.int32)
    target_logits, target_calls = run(runner, runner.get_model(), token_ids, monkeypatch)
    draft_logits, draft_calls = run(runner, draft.model, token_ids, monkeypatch)
    assert target_calls == list(draft.attention_layers.values())
    assert draft_calls == list(draft.attention_layers)
    target, proposal = target_logits.log_softmax(-1), draft_logits.log_softmax(-1)
    assert 0 < (proposal.exp() * (proposal - target)).sum(-1).mean() < 0.5
    again, _ = run(runner, runner.get_model(), token_ids, monkeypatch)
    assert torch.equal(again, target_logits)


def test_target_weights(runner, build, monkeypatch):
    draft = build(draft_weights="target")
    assert draft.int4_bytes == 0
    assert not draft.quantized
    assert len(draft.shared) == 21
    token_ids = torch.randint(0, 4096, (50,), generator=torch.Generator().manual_seed(8), dtype=torch.int32)
    target_logits, _ = run(runner, runner.get_model(), token_ids, monkeypatch)
    draft_logits, calls = run(runner, draft.model, token_ids, monkeypatch)
    assert torch.equal(draft_logits, target_logits)
    assert calls == list(draft.attention_layers)


@pytest.mark.parametrize(("draft_experts", "asked"), [("target", True), ("int4", True), ("int4", False)])
def test_int4_experts_without_a_mixture_are_said_to_have_no_effect(build, draft_experts, asked, monkeypatch):
    lines = []
    monkeypatch.setattr(draft_build.logger, "warning", lambda message, *values: lines.append(message % values))
    build(draft_experts=draft_experts, experts_asked=asked)
    said = ["quantspec: draft_experts 'int4' has no effect: this model has no mixture of experts"]
    assert lines == (said if draft_experts == "int4" and asked else [])


def test_options_are_checked(build):
    with pytest.raises(ValueError, match="draft_weights"):
        build(draft_weights="int2")
    with pytest.raises(ValueError, match="weight_rotation"):
        build(weight_rotation="random")
    with pytest.raises(ValueError, match="draft_activations"):
        build(draft_activations="int8")
    with pytest.raises(ValueError, match="weight_group_size"):
        build(weight_group_size=100)
    with pytest.raises(ValueError, match="Duplicate"):
        build(draft_weights="target")
        build(draft_weights="target")


def test_a_cache_that_cannot_be_shared_is_refused(runner):
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    class StateSpace(torch.nn.Module, AttentionLayerBase):
        layer_name = "model.layers.0.mixer"
        get_attn_backend = get_kv_cache_spec = lambda self, *args: None

    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={}),
        model_config=runner.vllm_config.model_config,
        additional_config={},
    )
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mixer is a StateSpace"):
        build_draft_model(config, torch.nn.Sequential(StateSpace()))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("num_tokens", [4, 100])
def test_many_rows_take_the_targets_weight(num_tokens, rotated):
    """The GPU's operator, on its CPU twin: INT4 for a few rows, the loaded weight where that is faster, if it is there."""
    from vllm_quantspec.integration.draft.linears import draft_linear
    from vllm_quantspec.kernels import int4_linear

    weight = torch.randn(64, 256).bfloat16()
    quantized = quantize_weight(weight, 128, rotated=rotated)
    packed = int4_linear.pack(quantized.codes, quantized.scales, quantized.zeros, 128)
    x = torch.randn(num_tokens, 256).bfloat16()
    in_int4 = (x.float() @ quantized.dequantize().t()).bfloat16()
    exact = torch.nn.functional.linear(x, weight)
    close = {"rtol": 0.02, "atol": 0.15}  # rotated inputs are rounded
    torch.testing.assert_close(draft_linear(x, packed.codes, packed.scales_zeros, None, None, rotated), in_int4, **close)
    expected = exact if num_tokens > int4_linear.MAX_FASTER_TOKENS else in_int4
    operator = torch.ops.vllm_quantspec.draft_linear
    torch.testing.assert_close(operator(x, packed.codes, packed.scales_zeros, None, weight, rotated), expected, **close)
    torch.library.opcheck(operator, (x, packed.codes, packed.scales_zeros, None, weight, rotated))
