"""Run a command as on an x86 CPU that has AVX2 and no AVX-512: ``python tools/as_avx2.py make demo``.

vLLM ships a library of its own for such CPUs (``_C_AVX2``), which has fewer operators, and PyTorch, oneDNN, MKL, Numba and
NumPy run other code there. The command and all of its child processes are told not to use AVX-512 or AMX, the compiler
behind torch.compile among them. Standard library only.
"""

import os
import platform
import sys
from pathlib import Path

HOOK = Path(__file__).resolve().parent / "avx2"


def environment(base: dict[str, str] | None = None) -> dict[str, str]:
    """``base`` (by default this process's environment) with what makes its processes do without AVX-512.

    Raises:
        RuntimeError: this is no x86 CPU.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise RuntimeError(f"AVX2 cannot be emulated on {platform.machine()}: run this on an x86 CPU.")
    base = dict(os.environ if base is None else base)
    return base | {
        "PYTHONPATH": os.pathsep.join(p for p in (str(HOOK), base.get("PYTHONPATH", "")) if p),
        "ATEN_CPU_CAPABILITY": "avx2",  # PyTorch's own kernels
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL",
        "TORCHINDUCTOR_CPP_MARCH": "haswell",  # where "native" has AVX-512, code of both kinds is mixed, and wrong
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi,+bmi2",
    }


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    os.execvpe(sys.argv[1], sys.argv[1:], environment())


if __name__ == "__main__":
    main()
