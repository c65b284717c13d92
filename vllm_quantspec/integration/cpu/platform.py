"""The CPU platform asks for its own attention backend, whatever was selected: let QUANTSPEC through."""

from vllm.platforms.cpu import CpuPlatform

from vllm_quantspec.integration.startup.backend_name import quantspec_backend
from vllm_quantspec.integration.startup.replace import replace


def _or_ours(get_attn_backend_cls):
    def get_selected_backend_cls(cls, selected_backend, attn_selector_config, *args, **kwargs):
        if selected_backend is not None and selected_backend is quantspec_backend():
            return selected_backend.get_path()
        return get_attn_backend_cls(cls, selected_backend, attn_selector_config, *args, **kwargs)

    return get_selected_backend_cls


def install() -> None:
    """Replace one class method."""
    replace(CpuPlatform, "get_attn_backend_cls", _or_ours)
