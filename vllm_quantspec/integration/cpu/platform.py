"""The CPU platform asks for its own attention backend, whatever was selected: let QUANTSPEC through."""

import functools

from vllm_quantspec.integration.startup.backend_name import quantspec_backend


def install() -> None:
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.get_attn_backend_cls.__func__
    if getattr(original, "_quantspec", False):
        return

    @functools.wraps(original)
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, *args, **kwargs):
        if selected_backend is not None and selected_backend is quantspec_backend():
            return selected_backend.get_path()
        return original(cls, selected_backend, attn_selector_config, *args, **kwargs)

    get_attn_backend_cls._quantspec = True
    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
