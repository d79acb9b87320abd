"""What the documentation says is what happens."""

import doctest
import importlib
import inspect
import os
import pathlib
import pkgutil
import re
import shlex
import shutil
import subprocess

import jax
import jax.numpy as jnp
import pytest
import tyro

import absgd_jax

ROOT = pathlib.Path(__file__).parents[2]
REFERENCE, MATHS = ROOT / "docs" / "reference.md", ROOT / "docs" / "maths.md"
BENCHMARKS, RESULTS = ROOT / "benchmarks" / "README.md", ROOT / "docs" / "results"
TABLES = ROOT / "benchmarks" / "results"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *RESULTS.glob("*.md"), BENCHMARKS]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]
PUBLIC = [absgd_jax, absgd_jax.losses, absgd_jax.diagnostics, absgd_jax.data]
MODULES = [m.name for m in pkgutil.walk_packages(absgd_jax.__path__, "absgd_jax.")]

pytestmark = pytest.mark.usefixtures("users_promotion")


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module):
    failed, _ = doctest.testmod(importlib.import_module(module))
    assert not failed


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code(page, capsys, monkeypatch, tmp_path):
    """The blocks of a page, one after another; where one trains, it succeeds."""
    monkeypatch.chdir(tmp_path)
    text, namespace = page.read_text(), {}
    namespace["zip"] = one_at_a_time(namespace)
    for block in BLOCK.finditer(text):
        # Blank lines in front, so that a traceback points into the page.
        source = "\n" * text[: block.start(1)].count("\n") + block[1]
        exec(compile(source, page, "exec"), namespace)
        # The numbers in comments behind print are what was printed, or nearly.
        stated = [float(x) for x in re.findall(r"^print\(.*\)  # (\d\.\d+)", source, re.MULTILINE)]
        printed = capsys.readouterr().out.split()
        if stated:
            assert [float(x) for x in printed] == pytest.approx(stated, abs=0.02)
        elif "train_step" in source:
            assert jnp.all(namespace.pop("loss") < jnp.log(10) / 2)


def one_at_a_time(namespace):
    """``zip`` for the loops: queued steps of devices that share a CPU can deadlock."""

    def batches(*args):
        for batch in zip(*args, strict=True):
            jax.block_until_ready(namespace.get("params"))
            yield batch

    return batches


def test_readme_and_start_have_code():
    assert {name_of(page) for page in WITH_CODE} >= {"README.md", "docs/start.md"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    """Those to files lead to one, and those to headings to one there."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in headings(target), link


def test_benchmarks_lists_every_page_of_results():
    listed = re.findall(
        r"^\| \[.*?\]\(\.\./docs/results/(\w+)\.md\) \|", BENCHMARKS.read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(page.stem for page in RESULTS.glob("*.md"))


@pytest.mark.parametrize("page", sorted(RESULTS.glob("*.md")), ids=name_of)
def test_commands_are_understood(page):
    """The benchmarks take every flag and value; and no page is without a command."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    commands = "".join(blocks).replace("\\\n", "").splitlines()
    assert commands
    for command in commands:
        assert_is_understood(*shlex.split(command))


@pytest.mark.parametrize("table", sorted(TABLES.glob("*/table.md")), ids=name_of)
def test_tables_have_their_command(table):
    """Above them; the site puts them on the page of its benchmark."""
    command = re.match(r"`(.*)`\n", table.read_text())[1]
    assert command.endswith(f" --out {table.parent.relative_to(ROOT)}")
    assert_is_understood(*shlex.split(command))


def assert_is_understood(python, m, module, *flags):
    assert (python, m) == ("python", "-m")
    module = "benchmarks.__main__" if module == "benchmarks" else module
    tyro.cli(importlib.import_module(module).Config, args=flags)


def test_commands_for_a_gpu_are_understood(tmp_path):
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\necho python "$@"\n')
    python.chmod(0o755)
    script = shutil.copy(ROOT / "benchmarks" / "gpu.sh", tmp_path / "benchmarks.sh")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", script], env={"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = done.stdout.splitlines()
    assert len(commands) == 4
    for command in commands:
        assert_is_understood(*command.split())


def test_maths_points_to_code_that_exists():
    rows = re.findall(r"\| (`[^|]*) in `absgd_jax/(\w+)\.py`", MATHS.read_text())
    assert rows
    for names, module in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(importlib.import_module(f"absgd_jax.{module}"), name), (module, name)


def headings(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
class TestPublicNames:
    def test_reference_has_them_all_and_no_other(self, module):
        sections = REFERENCE.read_text().split(".. currentmodule:: ")[1:]
        here = "".join(s for s in sections if s.split("\n")[0] == module.__name__)
        named = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", here, re.MULTILINE)
        listed = re.findall(r"^   (\w+)$", here, re.MULTILINE)
        modules = {"losses", "diagnostics", "data"}
        assert named == listed
        assert set(named) == {name for name in vars(module) if name[0] != "_"} - modules

    def test_functions_have_an_example(self, module):
        for name, function in vars(module).items():
            if inspect.isfunction(function):
                assert re.search(r"Examples:\n +>>> ", function.__doc__), name
