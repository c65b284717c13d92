"""An engine as on a CPU that has AVX2 and no AVX-512, where vLLM loads a library of its own, with fewer operators."""

import json
import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import as_avx2  # noqa: E402

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is a part of x86 CPUs"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU engine"),
]

ENGINE = """
import json, sys
import torch
from engine_tools import QUANTSPEC_CACHE, divergence, engine, generate, quantspec, speculation_counts
from vllm_quantspec.integration.draft import linears

model, prompt = sys.argv[1], json.loads(sys.argv[2])
said = []
linears.logger.info_once = lambda message, *values: said.append(message % values)
with engine(model, max_model_len=1024, **QUANTSPEC_CACHE) as llm:
    (expected,) = generate(llm, [prompt], 24)
with engine(model, max_model_len=1024, **quantspec(4)) as llm:
    (answer,) = generate(llm, [prompt], 24)
    drafts, accepted = speculation_counts(llm)
with open("/proc/self/maps") as maps:
    libraries = {line.split("/")[-1].split(".")[0] for line in maps if "/vllm/_C" in line}
print("RESULT " + json.dumps({
    "capability": torch.backends.cpu.get_cpu_capability(), "libraries": sorted(libraries), "said": said[0],
    "drafts": drafts, "accepted": accepted, "divergence": divergence(expected, answer), "tokens": len(answer.tokens),
}))
"""


def run_as_avx2(*command: str) -> str:
    """Standard output of a Python command in the emulation; its tests' modules can be imported."""
    env = as_avx2.environment()
    env["PYTHONPATH"] += f":{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="this CPU is one: every engine test is that test")
def test_speculation(books_4m, passage):
    from transformers import AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(books_4m).encode(passage)[:600]
    code = "import conftest\n" + ENGINE
    output = run_as_avx2("-c", code, books_4m, json.dumps(prompt))
    result = json.loads(next(line for line in output.splitlines() if line.startswith("RESULT "))[len("RESULT ") :])
    assert result["capability"] == "AVX2" and result["libraries"] == ["_C_AVX2"]
    assert result["said"] == "INT4 draft linears run on this package's CPU kernel."
    assert result["tokens"] == 24
    assert result["divergence"] is None or result["divergence"][1] <= 0.125  # a near-tie, see test_lossless.py
    assert result["drafts"] >= 4 and result["accepted"][0] > 0.5 * result["drafts"], result


def test_child_processes_too():
    """vLLM starts processes of its own; each of them is told the same."""
    code = (
        "import subprocess, sys\n"
        "child = 'import torch; print(torch.cpu._is_avx512_supported(), torch.cpu._is_amx_tile_supported())'\n"
        "print(subprocess.run([sys.executable, '-c', child], capture_output=True, text=True, timeout=120).stdout)"
    )
    assert run_as_avx2("-c", code).split() == ["False", "False"]


def test_compiled_code_has_no_avx512():
    code = (
        "import numba as nb, numpy as np\n"
        "f = nb.njit(fastmath=True)(lambda x: (x * x).sum())\n"
        "f(np.ones(99, np.float32))\n"
        "text = ''.join(f.inspect_asm().values())\n"
        "print('zmm' in text, 'ymm' in text)"
    )
    assert run_as_avx2("-c", code).split() == ["False", "True"]
