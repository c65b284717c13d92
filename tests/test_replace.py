"""The one way to replace a function of vLLM: once, of any kind, and never two replacements of one function."""

from types import ModuleType

import pytest

from vllm_quantspec.integration.startup.replace import replace, replaced


class Owner:
    factor = 3

    def method(self, x):
        """Documented."""
        return self.factor * x

    @classmethod
    def of_class(cls, x):
        return cls.factor + x

    @staticmethod
    def static(x):
        return x


def _plus_one(original):
    def new(*args):
        return original(*args) + 1

    return new


def _minus_one(original):
    return lambda *args: original(*args) - 1


def test_every_kind_of_function_once():
    for name, before in (("method", 6), ("of_class", 5), ("static", 2)):
        for _ in range(2):  # plugins are loaded more than once
            replace(Owner, name, _plus_one)
        assert getattr(Owner(), name)(2) == before + 1
        assert f"{__name__}.Owner.{name}" in replaced()
    assert Owner.of_class(2) == 6 and Owner.static(2) == 3 and Owner.method.__doc__ == "Documented."


def test_a_modules_object():
    module = ModuleType("some.module")
    module.launcher = lambda x: x
    replace(module, "launcher", _plus_one)
    assert module.launcher(1) == 2 and "some.module.launcher" in replaced()


def test_doubles_and_missing_functions_are_refused():
    class Other:
        def method(self):
            return 1

    replace(Other, "method", _plus_one)
    with pytest.raises(RuntimeError, match="method is replaced already, by .*_plus_one"):
        replace(Other, "method", _minus_one)
    assert Other().method() == 2
    with pytest.raises(RuntimeError, match="the installed vLLM has no .*Other.gone"):
        replace(Other, "gone", _plus_one)


def test_all_that_the_plugin_replaces_is_listed_in_the_docs():
    """docs/design.md has a row for each, so that a new vLLM can be compared with it."""
    from conftest import ROOT

    import vllm_quantspec
    import vllm_quantspec.integration.startup.worker  # noqa: F401  (what a worker of the CPU engine replaces)

    vllm_quantspec.register()
    table = (ROOT / "docs" / "design.md").read_text()
    ours = [name for name in replaced() if name.startswith(("vllm.", "llvmlite."))]
    assert len(ours) > 10
    for name in ours:
        assert f"`{name}`" in table, name
