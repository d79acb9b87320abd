"""What the documentation says is what happens."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import jax.numpy as jnp
import pytest

import absgd_jax

README = pathlib.Path(__file__).parents[1] / "README.md"
PUBLIC = [absgd_jax, absgd_jax.losses, absgd_jax.data, absgd_jax.diagnostics]
MODULES = [m.name for m in pkgutil.walk_packages(absgd_jax.__path__, "absgd_jax.")]


pytestmark = pytest.mark.usefixtures("users_promotion")


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module):
    failed, _ = doctest.testmod(importlib.import_module(module))
    assert not failed


def test_every_public_function_has_an_example():
    functions = [f for module in PUBLIC for f in vars(module).values() if inspect.isfunction(f)]
    assert len(functions) == 10 + 10 + 5 + 5
    for function in functions:
        assert ">>> " in function.__doc__, function.__name__


def test_readme(capsys):
    text = README.read_text()
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(blocks) == 12
    namespace = {}
    for block in blocks:
        # Blank lines in front, so that a traceback points into README.
        source = "\n" * text[: block.start(1)].count("\n") + block.group(1)
        exec(compile(source, README, "exec"), namespace)
        if "train_step" in block.group(1):
            scalars = {"mean_loss": namespace["loss"]} | namespace.get("scalars", {})
            assert jnp.all(scalars["mean_loss"] < 0.5 * jnp.log(10))
            namespace.pop("scalars", None)
    accuracies = re.findall(r"(long-tailed|noisy): (0\.\d+)", capsys.readouterr().out)
    assert [name for name, _ in accuracies] == ["long-tailed", "noisy"]
    assert all(float(accuracy) > 0.8 for _, accuracy in accuracies)


def test_readme_names_everything_public():
    text = README.read_text().split("## Public names")[1]
    for module in PUBLIC:
        for name in vars(module):
            if not name.startswith("_"):
                assert re.search(rf"`{name}\b", text), name
