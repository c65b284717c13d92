"""One plugin among others: it does nothing unasked, it can be switched off, and it goes when it is uninstalled.

Each case is a process of its own, started at the same time: what a plugin does to a process is what is tested.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from server_tools import START_SECONDS, environment

# Prints one line of JSON: what vLLM made of a model and a speculative config in this process, and then of quantspec.
SCRIPT = """
import contextlib, json, sys
with contextlib.suppress(ImportError):
    import sitecustomize  # what -S leaves out: the emulation of another CPU (tools/as_avx2.py), for one
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum

model, speculative_config = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(model, max_model_len=1024, max_num_seqs=2, enforce_eager=True, speculative_config=speculative_config)
config = llm.llm_engine.vllm_config
layers = config.compilation_config.static_forward_context.values()
params = SamplingParams(temperature=0, max_tokens=6)
found = {
    "backends": sorted({l.attn_backend.__name__ for l in layers if hasattr(l, "attn_backend")}),
    "tokens": llm.generate([{"prompt_token_ids": [5, 6, 7]}], params)[0].outputs[0].token_ids,
    "extension": config.parallel_config.worker_extension_cls,
    "block_size": config.cache_config.block_size,
    "modules": sorted(m for m in sys.modules if m.startswith("vllm_quantspec")),
    "known": "QUANTSPEC" in AttentionBackendEnum.__members__,
    "dummy": getattr(sys, "dummy_plugin", None),
}
print("LATER")
try:
    EngineArgs(model, max_model_len=1024, speculative_config={"method": "quantspec"}).create_engine_config()
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
print("FOUND " + json.dumps(found, default=list))
"""


def site_without_quantspec(folder: Path) -> Path:
    """All that is installed but this package, as links: what is left after `pip uninstall vllm-quantspec`."""
    folder.mkdir()
    for path in map(Path, {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        for entry in path.iterdir():
            if "quantspec" not in entry.name and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def another_plugin(folder: Path) -> Path:
    """A distribution with a general plugin that leaves a trace in its process."""
    metadata = folder / "dummy-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dummy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\ndummy = dummy_plugin:register\n")
    (folder / "dummy_plugin.py").write_text("import sys\n\n\ndef register():\n    sys.dummy_plugin = 'was here'\n")
    return folder


def beside_what_there_is(folder: Path) -> str:
    """``folder`` before this process's own PYTHONPATH, but for this checkout, which would be found there uninstalled."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(folder), *(p for p in paths if p and Path(p).resolve() != ROOT)])


@pytest.fixture(scope="module")
def cases(books_4m, tmp_path_factory):
    """{name: (what was found, log)}"""
    folder = tmp_path_factory.mktemp("plugin")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    dummy = {"PYTHONPATH": beside_what_there_is(another_plugin(folder / "dummy"))}
    uninstalled = {"PYTHONPATH": beside_what_there_is(site_without_quantspec(folder / "site"))}
    runs = {  # interpreter's options, speculative config, environment
        "installed": ([], None, {}),
        "switched off": ([], None, {**dummy, "VLLM_PLUGINS": "dummy"}),
        "uninstalled": (["-S"], None, uninstalled),
        "beside another": ([], {"method": "quantspec"}, {**dummy, "VLLM_PLUGINS": "dummy,quantspec"}),
    }

    def start(case):
        options, speculative_config, variables = case
        command = [sys.executable, *options, str(script), books_4m, json.dumps(speculative_config)]
        variables = {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **variables}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(command, cwd=folder, env=environment(**variables), timeout=START_SECONDS, **streams).stdout

    with ThreadPoolExecutor(2) as pool:
        logs = dict(zip(runs, pool.map(start, runs.values()), strict=True))
    found = {}
    for name, log in logs.items():
        lines = [line for line in log.splitlines() if line.startswith("FOUND ")]
        assert len(lines) == 1, f"{name}:\n{log[-3000:]}"
        found[name] = json.loads(lines[0].removeprefix("FOUND ")), log
    return found


def messages(log: str) -> set[str]:
    """What the engine's life left in the log, without times, process ids, measured numbers, paths and names of its own."""
    logged = [line.split("] ", 1)[-1] for line in log.partition("LATER")[0].splitlines() if LOGGED.search(line)]
    # vLLM's own lines about plugins list them; those of a stack trace name where vLLM is installed.
    logged = [m for m in logged if not (m.startswith("  File ") or "plugin" in m.lower() or "quantspec ->" in m)]
    return {re.sub(r"vllm_dist_\w+|0x[0-9a-f]+|\d+(\.\d+)?", "#", m) for m in logged}


LOGGED = re.compile(r"(DEBUG|INFO|WARNING|ERROR) \d\d-\d\d ")


@pytest.mark.parametrize("name", ["switched off", "uninstalled"])
def test_unasked_it_changes_nothing(cases, name):
    """The engine is that of a vLLM without the plugin: attention backend, tokens, and every line of the log but one.

    That one is missing here: vLLM sets up its log after it loads plugins, except in processes of their own.
    """
    (here, log), (without, log_without) = cases["installed"], cases[name]
    for key in ("backends", "tokens", "extension", "block_size"):
        assert here[key] == without[key], key
    assert here["known"] and not without["known"] and without["modules"] == []
    assert here["extension"] == "" and "vllm_quantspec.integration.cache.backend" not in here["modules"]
    assert messages(log) ^ messages(log_without) <= {"vllm-quantspec is registered."}
    assert len(messages(log)) > 50


@pytest.mark.parametrize("name", ["switched off", "uninstalled"])
def test_without_it_vllm_refuses_the_name(cases, name):
    found, _ = cases[name]
    assert "ValidationError" in found["error"] and "Input should be 'ngram'" in found["error"]


def test_beside_another_plugin(cases):
    found, _ = cases["beside another"]
    assert found["dummy"] == "was here" and found["backends"] == ["QuantSpecBackend"] and len(found["tokens"]) == 6
    assert found["block_size"] == 128 and "error" not in found
    assert cases["switched off"][0]["dummy"] == "was here" and cases["installed"][0]["dummy"] is None


def test_another_vllm_version(monkeypatch, caplog):
    """Nothing is registered, with a warning; other engines of that vLLM go on."""
    from vllm_quantspec.integration.startup import engine_args, register, version

    monkeypatch.setattr(register, "installed_vllm", lambda: "0.99.0")
    monkeypatch.setattr(engine_args, "install", lambda: pytest.fail("hooks were installed"))
    monkeypatch.setattr(register.logger, "handlers", [caplog.handler])  # vLLM's loggers do not propagate
    register.register()
    (message,) = {record.getMessage() for record in caplog.records if record.name == register.logger.name}
    assert message.startswith("vllm-quantspec works with vLLM 0.32.0 and 0.33.0, not 0.99.0: it stays off.")
    assert message.endswith(f" install {version.fitting_vllm()}.")
