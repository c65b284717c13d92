"""What cannot work is refused here, in one sentence, before weights are read (design rule 8)."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_quantspec import supported
from vllm_quantspec.config import CACHE_DTYPES, HEAD_SIZES
from vllm_quantspec.format import GROUP_SIZES
from vllm_quantspec.integration.startup.cache_dtype import page_bits
from vllm_quantspec.integration.startup.offloading import check_connector
from vllm_quantspec.integration.startup.version import check_version
from vllm_quantspec.kernels.decode_attention import MAX_REQUESTS
from vllm_quantspec.kernels.device import MIN_CAPABILITY, WGMMA_CAPABILITY
from vllm_quantspec.kernels.page_selection import MAX_PAGES

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.quantspec.checks")


def check_backend(args: EngineArgs, what: str) -> None:
    """``what`` was asked for reads the hierarchical cache, so another attention backend contradicts it."""
    backend = args.attention_backend if args.attention_backend is not None else args.attention_config.backend
    if backend is not None:
        name = getattr(backend, "name", backend)
        raise ValueError(
            f"quantspec: {what} reads the hierarchical KV cache of the attention backend QUANTSPEC, but {name} was "
            "selected; drop --attention-backend."
        )


def check_block_size(block_size: int | None, group_size: int) -> None:
    if block_size is not None and block_size != group_size:
        raise ValueError(
            f"quantspec: a page of the KV cache is one quantization group, so --block-size must equal group_size "
            f"{group_size}, but it is {block_size}; drop --block-size, or set group_size to it (64 or 128)."
        )


def check_args(args: EngineArgs) -> None:
    """Checks that need the flags alone.

    Raises:
        RuntimeError: an unsupported vLLM version. ValueError: anything else.
    """
    check_version()
    if current_platform.is_cpu():
        # vLLM's own check of the runner comes before `check_config`, and asks for Triton.
        check_cpu_runner(envs.VLLM_USE_V2_MODEL_RUNNER)
    if args.block_size not in GROUP_SIZES:
        raise ValueError(
            f"quantspec: the attention backend QUANTSPEC has pages of 64 or 128 tokens, not {args.block_size}; set "
            "--block-size to 64 or 128."
        )
    if args.kv_cache_dtype not in ("auto", "bfloat16", "float16"):
        raise ValueError(
            f"quantspec: the hierarchical KV cache has a format of its own, so --kv-cache-dtype {args.kv_cache_dtype} "
            f"cannot be combined with it; drop --kv-cache-dtype, or set it to {' or '.join(CACHE_DTYPES)}."
        )
    for flag, value, unset, what in (
        ("--decode-context-parallel-size", args.decode_context_parallel_size, 1, "decode-context parallelism"),
        ("--prefill-context-parallel-size", args.prefill_context_parallel_size, 1, "prefill-context parallelism"),
    ):
        if value != unset:
            raise ValueError(f"quantspec: {what} is not supported by the hierarchical KV cache; drop {flag}.")
    check_connector(args)


def check_config(config: VllmConfig) -> None:
    """Checks that need the model's configuration.

    Raises:
        ValueError: one sentence that says what, why and what to do.
    """
    model = config.model_config
    for present, what in (
        (model.use_mla, supported.MLA),
        (model.is_encoder_decoder, supported.ENCODER),
        (model.is_attention_free, supported.RECURRENT_ALONE),
        (model.uses_alibi, supported.ALIBI),
        *((True, what) for what in supported.attention_of(model.hf_text_config.to_dict(), model.architectures)),
        (config.cache_config.sliding_window, supported.SLIDING),
        (model.runner_type != "generate", "a pooling runner"),
    ):
        if present:
            raise ValueError(supported.not_implemented(model.model, what))
    if model.is_mm_prefix_lm:  # not where images are switched off
        raise ValueError(supported.attends_within_images(model.model))
    if model.get_head_size() not in HEAD_SIZES:
        raise ValueError(supported.wrong_head_size(model.model, model.get_head_size()))
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            "quantspec: pages and recent windows are two KV cache groups, which need vLLM's hybrid KV cache manager; "
            "drop --disable-hybrid-kv-cache-manager."
        )
    check_cache_dtype(config)
    if current_platform.is_cpu():
        check_cpu_runner(config.use_v2_model_runner)
    else:
        check_gpu(config, current_platform)
        warn_of_mps()
    if model.is_hybrid:
        check_hybrid(config)
    if config.speculative_config is not None:
        check_speculation(config)
    if current_platform.is_cpu() and config.parallel_config.pipeline_parallel_size > 1:
        # Its runner never allocates what a later stage receives (GPUModelRunner.intermediate_tensors).
        raise ValueError(
            "quantspec: vLLM's CPU engine fails at the first request with pipeline parallelism, whatever the KV cache; "
            "drop --pipeline-parallel-size, or use --tensor-parallel-size."
        )


def check_hybrid(config: VllmConfig) -> None:
    """What does not go with Mamba and linear-attention layers, which have a state instead of keys and values."""
    if config.speculative_config is not None:
        raise ValueError(supported.not_drafted_for(supported.SOME_RECURRENT, supported.ALONE))
    if config.kv_transfer_config is not None:
        raise ValueError(
            f"quantspec: KV offloading was not tried with {supported.SOME_RECURRENT} on this cache; drop "
            "--kv-offloading-size and --kv-transfer-config."
        )


def check_cache_dtype(config: VllmConfig) -> None:
    """The exact window has the model's dtype, and neither a flag nor a checkpoint may ask for another."""
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    asked = config.cache_config.cache_dtype
    if asked == "auto":  # vLLM's attention layers take an FP8 cache for it where compressed-tensors has a scheme
        quantization = getattr(config.model_config.hf_config, "quantization_config", None)
        asked = "fp8" if isinstance(quantization, dict) and quantization.get("kv_cache_scheme") else "auto"
    if asked in ("auto", dtype):
        return
    if asked in ("bfloat16", "float16"):
        raise ValueError(
            f"quantspec: the newest tokens of the hierarchical KV cache are kept in the model's own dtype, {dtype}, so "
            f"--kv-cache-dtype {asked} cannot be combined with it; drop --kv-cache-dtype, or set --dtype {asked}."
        )
    remedy = "--dtype bfloat16 --kv-cache-dtype bfloat16" if dtype == "float32" else f"--kv-cache-dtype {dtype}"
    raise ValueError(
        f"quantspec: the checkpoint {config.model_config.model} asks for a KV cache in {asked}, but the hierarchical KV "
        f"cache has a format of its own; set {remedy} to run it without the checkpoint's."
    )


def check_cpu_runner(is_v2: bool | None) -> None:
    """The CPU engine is built on model runner V1; vLLM's default there is V2 where Triton for CPU is installed."""
    if is_v2:
        raise ValueError(
            "quantspec: on a CPU it works with vLLM's model runner V1, but this engine would run V2; set "
            "VLLM_USE_V2_MODEL_RUNNER=0 in its environment."
        )


def check_gpu(config: VllmConfig, platform) -> None:
    """What the GPU kernels need beyond the CPU engine."""
    if not platform.is_cuda():
        raise ValueError(
            "quantspec: its kernels run on NVIDIA GPUs and on vLLM's CPU engine, not on this platform "
            f"({platform.device_name}); run without quantspec here."
        )
    for missing, what, remedy in (
        (
            not platform.has_device_capability(MIN_CAPABILITY),
            f"a GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} (Ampere) or newer",
            "run without quantspec on this GPU",
        ),
        (
            find_spec("cuda") is None or find_spec("cuda.bindings") is None,
            "the Python package cuda-bindings, which compiles its kernels",
            "install it (it comes with PyTorch for CUDA)",
        ),
        (config.model_config.dtype.itemsize != 2, "a 16-bit model on a GPU", "set --dtype bfloat16 or float16"),
        (
            not config.use_v2_model_runner,
            "vLLM's model runner V2 on a GPU",
            "unset VLLM_USE_V2_MODEL_RUNNER, or drop what vLLM's log says V2 does not support",
        ),
        (config.parallel_config.use_ubatching, "one batch at a time", "drop --enable-dbo and --ubatch-size"),
        (
            config.scheduler_config.max_num_seqs > MAX_REQUESTS,
            f"at most {MAX_REQUESTS} sequences per step",
            f"set --max-num-seqs to {MAX_REQUESTS} or less",
        ),
    ):
        if missing:
            raise ValueError(f"quantspec: it needs {what}; {remedy}.")


def check_speculation(config: VllmConfig) -> None:
    """What the draft adds to the cache's own limits."""
    from vllm_quantspec.integration.startup.speculative_config import QuantSpecConfig

    if not isinstance(config.speculative_config, QuantSpecConfig):
        return check_other_drafts(config)
    if config.speculative_config.draft_kv == "int8" and page_bits(config) == 4:
        raise ValueError(
            "quantspec: draft_kv 'int8' reads both halves of a page, but pages of --kv-cache-dtype quantspec_int4 have the "
            "upper half alone; drop one of them."
        )
    context, longest = config.speculative_config.draft_context, config.model_config.max_model_len
    if isinstance(context, int) and context > longest:
        raise ValueError(
            f"quantspec: draft_context {context} is more tokens than a request of this engine has, {longest} "
            "(--max-model-len); make it smaller, or set it to 'all'."
        )
    if config.speculative_config.draft_activations == "fp8" and not current_platform.is_cpu():
        check_fp8(current_platform.get_device_capability())
    check_own_scheduler(config)
    settle_draft_context(config)
    settle_draft_experts(config)
    slides = supported.sliding_layers(config.model_config.hf_text_config.to_dict()) == "some"
    for present, what, remedy in (
        (slides, supported.SOME_SLIDING, supported.ALONE),
        (config.parallel_config.pipeline_parallel_size > 1, "pipeline parallelism", "drop --pipeline-parallel-size"),
        (
            config.lora_config is not None and config.speculative_config.weight_rounding == "gptq",
            "LoRA with weight_rounding 'gptq', which watches the linears' own inputs,",
            "set weight_rounding to 'search'",
        ),
        (
            config.lora_config is not None and config.speculative_config.draft_weights in ("mixed", "auto"),
            f"LoRA with draft_weights {config.speculative_config.draft_weights!r}, which puts the draft's linears into the "
            "target to measure them,",
            "set draft_weights to 'int4' or 'int8'",
        ),
        (
            supported.STREAMED & set(config.model_config.architectures),
            supported.STREAMED_INPUT,
            supported.ALONE,
        ),
    ):
        if present:
            raise ValueError(supported.not_drafted_for(what, remedy))


def warn_of_mps() -> None:
    """Without MPS a GPU is one process's at a time, so that CTAs that wait for each other are all on it."""
    control = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control"
    if control.exists():
        logger.warning_once(
            "quantspec: CUDA MPS runs here (%s), and kernels of this package have CTAs that wait for each other: two "
            "engines that share a GPU by MPS can wait for ever; give each engine a GPU of its own.",
            control,
        )


def check_fp8(capability: tuple[int, int]) -> None:
    """Inputs in FP8 are multiplied by a kernel for Hopper alone; elsewhere they would lose acceptance and save nothing."""
    if tuple(capability) != WGMMA_CAPABILITY:
        raise ValueError(
            "quantspec: draft_activations 'fp8' needs a Hopper GPU (compute capability {}.{}), and this one has {}.{}; drop "
            "it.".format(*WGMMA_CAPABILITY, *capability)
        )


def check_own_scheduler(config: VllmConfig) -> None:
    """The number of drafts is chosen while running by a scheduler of ours, one per engine."""
    speculative = config.speculative_config
    if speculative.chooses_number and config.scheduler_config.scheduler_cls is not None:
        raise ValueError(f"quantspec: num_speculative_tokens 'auto' {another_scheduler(config)}; drop one of them.")
    # Data-parallel engines of a dense model know nothing of each other.
    if speculative.chooses_number and config.parallel_config.data_parallel_size > 1 and config.model_config.is_moe:
        raise ValueError(
            "quantspec: num_speculative_tokens 'auto' is chosen by each data-parallel rank for itself, and ranks that share "
            "a mixture's experts wait for each other for ever if they draft different numbers; set num_speculative_tokens "
            "to a number, or drop --data-parallel-size."
        )


def another_scheduler(config: VllmConfig) -> str:
    return (
        "is chosen by a scheduler of its own, so it cannot be combined with --scheduler-cls "
        f"{config.scheduler_config.scheduler_cls}"
    )


def settle_draft_context(config: VllmConfig) -> None:
    """Sparse drafts that cannot be had are refused where the user asked for them; by default drafts read everything then."""
    speculative = config.speculative_config
    context, group, longest = speculative.draft_context, speculative.group_size, config.model_config.max_model_len
    if context == "all":
        return
    problem = None
    if speculative.weighs_sparse_drafts and config.scheduler_config.scheduler_cls is not None:
        problem, remedy = another_scheduler(config), "drop one of them"
    elif not current_platform.is_cpu() and longest > MAX_PAGES * group:
        problem = f"chooses among at most {MAX_PAGES} pages of {group} tokens, but --max-model-len is {longest}"
        remedy = "set draft_context to 'all'"
    if problem is None:
        return
    if {"draft_context", "draft_selection"} & set(speculative.asked_for):
        raise ValueError(f"quantspec: draft_context {context!r} {problem}; {remedy}.")
    speculative.draft_context = "all"
    logger.info("Drafts read the whole cache: draft_context %r, the default, %s", context, problem)


def settle_draft_experts(config: VllmConfig) -> None:
    """By default a mixture's draft reads the target's experts where the flags show that it could have no INT4 ones.

    What can be seen of the loaded layers alone is settled there (`draft.model`); where the user asked, it says why not.
    """
    speculative, parallel = config.speculative_config, config.parallel_config
    if speculative.draft_experts != "int4" or "draft_experts" in speculative.asked_for:
        return
    if not config.model_config.get_num_experts():
        return
    for present, reason in (
        (config.model_config.quantization is not None, "they are quantized already"),
        (config.lora_config is not None, "they may run with LoRA adapters"),
        (parallel.enable_expert_parallel, "they are spread over ranks by expert parallelism"),
        (parallel.data_parallel_size > 1, "data parallelism gathers their inputs from other ranks"),
    ):
        if present:
            speculative.draft_experts = "target"
            logger.info("The draft reads the target's experts: %s", reason)
            return


def check_other_drafts(config: VllmConfig) -> None:
    """Of vLLM's own drafts, n-grams need nothing of the cache but the room that QuantSpec's drafts need."""
    method = config.speculative_config.method
    if method != "ngram":
        raise ValueError(
            f"quantspec: the hierarchical KV cache takes drafts of the methods quantspec and ngram, not of {method}, which "
            "may need a cache of their own; use one of those methods, or drop --attention-backend QUANTSPEC."
        )
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(supported.not_drafted_for("pipeline parallelism", "drop --pipeline-parallel-size"))
