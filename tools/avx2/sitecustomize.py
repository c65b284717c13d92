"""Python imports this module when it starts, if its folder is on PYTHONPATH: see ../as_avx2.py.

PyTorch then reports a CPU without AVX-512 and AMX, by which vLLM chooses its library. It changes ``torch.cpu`` when that
is imported, because most processes never import it.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from types import MappingProxyType

HERE = os.path.dirname(os.path.abspath(__file__))


class WithoutAvx512:
    """Finds ``torch.cpu`` as everybody does, and changes it when it has been loaded."""

    def find_spec(self, name, path, target=None):
        if name != "torch.cpu":
            return None
        spec = PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            reported = module.get_capabilities

            def get_capabilities():
                hidden = ("avx512", "avx10", "amx", "avx_vnni", "avx_ne_convert")
                return MappingProxyType({k: False if k.startswith(hidden) else v for k, v in reported().items()})

            module.get_capabilities = get_capabilities

        spec.loader.exec_module = load_and_change
        return spec


sys.meta_path.insert(0, WithoutAvx512())

# The environment's own sitecustomize, which this one hides.
others = [p for p in sys.path if os.path.abspath(p or ".") != HERE]
hidden_spec = PathFinder.find_spec("sitecustomize", others)
if hidden_spec is not None and hidden_spec.loader is not None:
    hidden_spec.loader.exec_module(importlib.util.module_from_spec(hidden_spec))
