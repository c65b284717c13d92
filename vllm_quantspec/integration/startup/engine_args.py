"""Hooks into ``EngineArgs``: the word ``quantspec``, and everything that can be refused before anything is loaded.

Three methods are replaced: ``add_cli_args`` (a bare word beside JSON, this cache's names), ``create_speculative_config``
(our configuration class), ``create_engine_config`` (block size and attention backend follow from QuantSpec; checks before
and after).
"""

from __future__ import annotations

import json
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_quantspec.config import CACHE_DTYPES, METHOD, is_quantspec, parse_options
from vllm_quantspec.integration.draft.scheduler_name import use_scheduler
from vllm_quantspec.integration.startup import checks
from vllm_quantspec.integration.startup.backend_name import quantspec_backend
from vllm_quantspec.integration.startup.cache_dtype import take_cache_dtype
from vllm_quantspec.integration.startup.layer_backends import leave_sliding_layers, wants_quantspec_cache
from vllm_quantspec.integration.startup.offloading import offload_pages
from vllm_quantspec.integration.startup.one_copy import check_unused, read_one_copy
from vllm_quantspec.integration.startup.overlap import let_compiled_kernels_overlap
from vllm_quantspec.integration.startup.replace import replace


def extension_path(users_extension: str) -> str:
    """Path for ``worker_extension_cls``; the user's own extension, if any, is named in hexadecimal."""
    path = "vllm_quantspec.integration.startup.worker.WorkerExtension"
    if not users_extension or users_extension.startswith(path):
        return users_extension or path
    return f"{path}_of_{users_extension.encode().hex()}"


def prepare_args(args: EngineArgs) -> bool:
    """Make the flags that QuantSpec implies explicit, in place; whether this engine uses QuantSpec at all.

    Raises:
        ValueError: one sentence, for options or flags that contradict QuantSpec.
    """
    if args.spec_method == METHOD:  # --spec-method, --spec-tokens: vLLM's short forms
        given = args.speculative_config if isinstance(args.speculative_config, dict) else {}
        args.speculative_config = {**given, "method": METHOD}
        if args.spec_tokens is not None:
            args.speculative_config["num_speculative_tokens"] = args.spec_tokens
        args.spec_method = args.spec_tokens = None
    speculates = is_quantspec(args.speculative_config)
    asked_for = f"--kv-cache-dtype {args.kv_cache_dtype}"
    named = take_cache_dtype(args)
    if not speculates and not named and not wants_quantspec_cache(args):
        check_unused(args.additional_config)
        return False
    if not wants_quantspec_cache(args):
        checks.check_backend(args, "speculation" if speculates else asked_for)
        args.attention_backend = quantspec_backend()
    if speculates:
        options, _ = parse_options(args.speculative_config)
        checks.check_block_size(args.block_size, options.group_size)
        args.block_size = options.group_size
    elif args.block_size is None:
        args.block_size = 128
    checks.check_args(args)
    args.worker_extension_cls = extension_path(args.worker_extension_cls)
    return True


def word_or_json(text: str) -> Any:
    """Type of ``--speculative-config``: the bare word, or JSON as before."""
    if text == METHOD:
        return {"method": METHOD}
    if text == "None":
        return None
    return json.loads(text)


def _with_bare_word(add_cli_args):
    def add_cli_args_with_word(parser):
        parser = add_cli_args(parser)
        for action in parser._actions:
            if "--speculative-config" in action.option_strings:
                action.type = word_or_json
            elif "--spec-method" in action.option_strings and action.choices:
                action.choices = [*action.choices, METHOD]
            elif "--kv-cache-dtype" in action.option_strings and action.choices:
                action.choices = [*action.choices, *CACHE_DTYPES]
        return parser

    return add_cli_args_with_word


def _with_quantspec(create_speculative_config):
    def create_quantspec_config(self, target_model_config, target_parallel_config):
        if not is_quantspec(self.speculative_config):
            return create_speculative_config(self, target_model_config, target_parallel_config)
        from vllm_quantspec.integration.startup.speculative_config import make_config

        return make_config(self.speculative_config, target_model_config, target_parallel_config)

    return create_quantspec_config


def _with_checks(create_engine_config):
    def create_checked_engine_config(self, *args, **kwargs) -> VllmConfig:
        uses_quantspec = prepare_args(self)
        config = create_engine_config(self, *args, **kwargs)
        if uses_quantspec:
            checks.check_config(config)
            leave_sliding_layers(config)
            offload_pages(config)
            use_scheduler(config)
            let_compiled_kernels_overlap(config)
            read_one_copy(config)
        return config

    return create_checked_engine_config


def install() -> None:
    """Replace the three methods."""
    replace(EngineArgs, "add_cli_args", _with_bare_word)
    replace(EngineArgs, "create_speculative_config", _with_quantspec)
    replace(EngineArgs, "create_engine_config", _with_checks)
