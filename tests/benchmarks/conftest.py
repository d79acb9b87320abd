import shlex
import sys

import matplotlib.image
import pytest

from tests.support.commands import load


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Runs a benchmark in this process; its results, its table, and what it printed."""

    def start(module, options="", out=tmp_path):
        command = ["-m", module.__name__, *shlex.split(options), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [module.__file__, *command[2:]])
        monkeypatch.setattr(sys, "orig_argv", ["python3", *command])
        module.main()
        for picture in out.glob("*.png"):
            assert matplotlib.image.imread(picture).std() > 0.03, picture
        return load(out), (out / "table.md").read_text(), capsys.readouterr().out

    return start
