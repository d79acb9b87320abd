"""What is imported is declared, and what is declared is imported."""

import ast
import pathlib
import re
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Of distributions that are not named as what is imported from them.
MODULES = {
    "absgd-jax": "absgd_jax",
    "orbax-checkpoint": "orbax",
    "scikit-learn": "sklearn",
}
# Run, and not imported.
TOOLS = {"pytest-xdist"}

LIBRARY, BENCHMARKS, EXAMPLES, TESTS = (
    set((ROOT / folder).rglob("*.py"))
    for folder in ("absgd_jax", "benchmarks", "examples", "tests")
)
# By PyTorch, in an environment that may have no JAX.
REFERENCE = {
    ROOT / "benchmarks" / "torch_speed.py",
    ROOT / "tests" / "support" / "record_torch.py",
    ROOT / "tests" / "support" / "reference.py",
}
OURS = {"absgd_jax", "benchmarks", "examples", "tests"}


def declared(*requirements):
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements} - TOOLS
    return {MODULES.get(name, name) for name in names} - OURS


def imported(files):
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - OURS


@pytest.mark.parametrize(
    ("files", "requirements", "beside"),
    [
        (LIBRARY, PROJECT["dependencies"], []),
        (
            (BENCHMARKS | EXAMPLES) - REFERENCE,
            EXTRAS["bench"] + EXTRAS["cifar"],
            PROJECT["dependencies"],
        ),
        (TESTS - REFERENCE, EXTRAS["test"], PROJECT["dependencies"] + EXTRAS["bench"]),
        (REFERENCE, EXTRAS["reference"], ["numpy"]),
        (
            [ROOT / "benchmarks" / "pod.py"],
            EXTRAS["pod"],
            PROJECT["dependencies"] + EXTRAS["bench"],
        ),
    ],
    ids=["library", "bench", "test", "reference", "pod"],
)
def test_imports(files, requirements, beside):
    found = imported(files)
    assert declared(*requirements) <= found
    assert found <= declared(*requirements, *beside)


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == PROJECT["version"]
