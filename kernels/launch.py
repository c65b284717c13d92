"""What every Triton launcher uses: Triton where it is installed, checks of arguments, options of a launch."""

import torch

from vllm_quantspec.format import DTYPES, PageFormat
from vllm_quantspec.kernels.device import device_properties

try:
    import triton
    import triton.language as tl
except ImportError:  # the module must import everywhere; a kernel runs only where Triton is
    triton = None

    class tl:
        constexpr = None


def jit(function=None, **options):
    """`triton.jit`, or nothing where Triton is not installed."""
    if function is None:
        return lambda f: jit(f, **options)
    return function if triton is None else triton.jit(function, **options)


@jit
def _nothing():
    """Tells how Triton wraps a function here: to compile or to interpret it."""


def overlap(x: torch.Tensor) -> dict[str, bool]:
    """Arguments of a launch that may begin under the end of the one before it (programmatic dependent launch).

    Its kernel waits before it uses what that one writes, and releases its successor after that, so that a kernel that runs
    ahead finds all but its direct predecessor complete.
    """
    overlaps = x.is_cuda and device_properties(x.device.index).overlaps
    return {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


# --- Checks: each raises ValueError, and `check_device` RuntimeError where Triton is not installed --------------------


def check_device(x: torch.Tensor) -> None:
    if triton is None:
        raise RuntimeError("This kernel needs Triton, which is not installed.")
    if not x.is_cuda and isinstance(_nothing, triton.JITFunction):
        raise ValueError(f"Triton kernels run on a GPU (on {x.device} only with TRITON_INTERPRET=1).")


def check_pages(fmt: PageFormat, pages: torch.Tensor) -> None:
    inner = (fmt.num_kv_heads, fmt.head_bytes)
    if pages.dtype != torch.uint8 or pages.shape[1:] != inner or pages.stride(2) != 1:
        raise ValueError(
            f"pages must be uint8 [any, {inner[0]}, {inner[1]}] with contiguous heads, "
            f"got {pages.dtype} {list(pages.shape)}."
        )
    if (pages.data_ptr() | pages.stride(0) | pages.stride(1)) & 1:
        raise ValueError(f"pages must begin at even addresses, got strides {pages.stride()}.")


def check_window(fmt: PageFormat, window: torch.Tensor) -> None:
    inner = (fmt.num_kv_heads, fmt.window_block_size, 2 * fmt.head_size)
    if window.dtype != fmt.dtype or window.shape[1:] != inner or window.stride()[2:] != (inner[2], 1):
        raise ValueError(
            f"window must be {fmt.dtype} [any, {inner[0]}, {inner[1]}, {inner[2]}] with contiguous heads, "
            f"got {window.dtype} {list(window.shape)}."
        )


def check_rows(fmt: PageFormat, **tensors: torch.Tensor) -> None:
    """Keys or values of tokens."""
    for name, x in tensors.items():
        if x.dtype not in DTYPES or x.shape[1:] != (fmt.num_kv_heads, fmt.head_size) or x.stride(2) != 1:
            raise ValueError(
                f"{name} must be floating point [any, {fmt.num_kv_heads}, {fmt.head_size}] with contiguous channels, "
                f"got {x.dtype} {list(x.shape)}."
            )


def check_int32(**tensors: torch.Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype != torch.int32 or x.stride(-1) != 1:
            raise ValueError(f"{name} must be int32 with contiguous rows, got {x.dtype} with strides {x.stride()}.")


def check_metadata(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, **tables: torch.Tensor) -> None:
    check_int32(query_start_loc=query_start_loc, seq_lens=seq_lens, **tables)
    requests = seq_lens.shape[0]
    if requests < 1 or query_start_loc.shape[0] != requests + 1 or any(t.shape[0] != requests for t in tables.values()):
        raise ValueError(f"Need one start more than the {requests} requests and a row of each table for each of them.")
