"""What the documentation says is what happens."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import pytest

import absgd_jax

README = pathlib.Path(__file__).parents[1] / "README.md"
MODULES = [m.name for m in pkgutil.walk_packages(absgd_jax.__path__, "absgd_jax.")]


@pytest.fixture(autouse=True)
def users_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module):
    failed, _ = doctest.testmod(importlib.import_module(module))
    assert not failed


def test_every_public_name_has_an_example():
    public = [f for f in vars(absgd_jax).values() if callable(f)]
    functions = [f for f in public if not isinstance(f, type)]
    assert len(functions) == 6
    for function in functions:
        assert ">>> " in function.__doc__, function.__name__


def test_readme():
    text = README.read_text()
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(blocks) == 3
    namespace, first_losses = {}, []
    for block in blocks:
        # Blank lines in front, so that a traceback points into README.
        source = "\n" * text[: block.start(1)].count("\n") + block.group(1)
        exec(compile(source, README, "exec"), namespace)
        first_losses.append(namespace["loss"])
    assert all(loss < 0.5 * jnp.log(10) for loss in first_losses)


def test_readme_names_everything_public():
    text = README.read_text().split("## Public names")[1]
    for name in vars(absgd_jax):
        if not name.startswith("_"):
            assert re.search(rf"`{name}\b", text), name
