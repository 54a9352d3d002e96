"""The scripts run wherever learners run Python: in notebooks, in editors, through uv."""

import json
import os
import re
import subprocess
import sys

import keras
import pytest
from conftest import (
    DEMO_ENDS,
    PREDICT,
    TRANSFER,
    WRITTEN,
    check_error,
    copy_features,
    list_written,
    run,
    run_program,
    save_model,
    write_data,
)

import transfer_vgg16

# Everything here is a process of its own
pytestmark = pytest.mark.slow


@pytest.fixture
def place(demo, tmp_path):
    """A directory that has the demo's stored outputs, so that its runs take seconds."""
    (tmp_path / "demo").mkdir()
    copy_features(demo[0] / "demo", tmp_path / "demo")
    return tmp_path


def check_demo(directory):
    """Check that the demo wrote all its files, and a model that can be loaded."""
    assert list_written(directory / "demo") == WRITTEN
    model = keras.models.load_model(directory / "demo" / "vgg16_cifar10.keras")
    assert model.output_shape == (None, 10)


# ----- notebooks


def run_cells(*cells, cwd):
    """Run `cells` in one Jupyter kernel in `cwd`; return a dict of the outputs of each.

    stdout, stderr: its texts; figures: how many; error: the traceback, if any.
    """
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    program = """
        import json, sys
        import nbclient, nbformat

        cells = [nbformat.v4.new_code_cell(cell) for cell in json.loads(sys.argv[1])]
        notebook = nbformat.v4.new_notebook(cells=cells)
        client = nbclient.NotebookClient(notebook, kernel_name="python3", allow_errors=True)
        client.execute()
        nbformat.write(notebook, "notebook.ipynb")
    """
    run_program(program, json.dumps(cells), cwd=cwd)
    results = []
    for cell in json.loads((cwd / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]:
        result = {"stdout": "", "stderr": "", "figures": 0, "error": None}
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                result[output["name"]] += "".join(output["text"])
            elif output["output_type"] == "error":
                result["error"] = "\n".join(output["traceback"])
            else:
                result["figures"] += "image/png" in output["data"]
        results.append(result)
    return results


def test_notebook(tmp_path):
    """One kernel after the other command that a README or a teacher may name."""
    write_data(tmp_path / "data.npz")
    save_model(tmp_path / "article.keras")
    blocked = tmp_path / "blocked"  # the kernel's backend, which the child cannot import
    blocked.mkdir()
    (blocked / "matplotlib_inline.py").write_text("raise ModuleNotFoundError('not here')")
    first, second, predicted, called, error, child = run_cells(
        f"%run {TRANSFER} --demo",
        f"%run {TRANSFER} --demo",
        f"%run {PREDICT} --model article.keras --data data.npz",
        "import transfer_vgg16; transfer_vgg16.main(['--demo'])",
        "transfer_vgg16.main(['--data', 'missing.npz'])",
        f"import sys\n!PYTHONPATH=blocked {{sys.executable}} {TRANSFER} --demo",
        cwd=tmp_path,
    )
    for cell in (first, second, predicted, called, error, child):
        assert cell["error"] is None
    for cell in (first, second, called):
        assert cell["stderr"] == ""
        assert re.search(DEMO_ENDS, cell["stdout"])
        assert cell["figures"] == 6
    assert "run over" in first["stdout"]
    assert "run over" not in second["stdout"] + called["stdout"]
    results = [re.findall(r"^\[.+\]$", cell["stdout"], re.M) for cell in (first, second, called)]
    assert results[0] == results[1] == results[2] != []

    assert predicted["stderr"] == ""
    assert re.search(r"^予測: \d, 正解: \[\d\]$", predicted["stdout"], re.M)
    assert error["stdout"].count("\n") == 2  # on what it computes, and the settings
    assert re.fullmatch("error: missing.npz does not exist: .+\n", error["stderr"])
    backend = "module://matplotlib_inline.backend_inline"
    assert f"MPLBACKEND={backend} is ignored: not here" in child["stdout"]
    assert re.search(DEMO_ENDS, child["stdout"])
    assert "Traceback" not in child["stdout"] + child["stderr"]
    check_demo(tmp_path)


def test_unusable_backend_is_ignored_with_a_line(place, monkeypatch, capsys):
    backend = "module://no_such_module"
    stdout, stderr = run(TRANSFER, "--demo", cwd=place, MPLBACKEND=backend)
    assert stderr == ""
    assert len(re.findall(f"^MPLBACKEND={backend} is ignored: .+$", stdout, re.M)) == 1
    check_demo(place)
    monkeypatch.setenv("MPLBACKEND", "no-such-backend")  # another error of matplotlib's
    transfer_vgg16.choose_backend()
    assert capsys.readouterr().out.startswith("MPLBACKEND=no-such-backend is ignored: ")


# ----- editors


STREAMS = {
    "IDLE": """
        from idlelib.run import StdOutputFile

        class Shell:
            def __init__(self, file):
                self.file = file

            def write(self, text, tag):
                self.file.write(text)
                return len(text)

        def stream(file, name):
            return StdOutputFile(Shell(file), name)
        """,
    "like IDLE": """
        import io

        class Stream(io.TextIOBase):
            encoding, errors = "utf-8", "strict"

            def __init__(self, file):
                self.file = file

            def isatty(self):
                return True

            def write(self, text):
                self.file.write(text)
                return len(text)

        def stream(file, name):
            return Stream(file)
        """,
    "Spyder and Thonny": """
        class Stream:
            encoding = "utf-8"

            def __init__(self, file):
                self.write, self.flush = file.write, file.flush

        def stream(file, name):
            return Stream(file)
        """,
}
RUN = """
        import runpy, sys

        sys.stdout, sys.stderr = stream(sys.stdout, "stdout"), stream(sys.stderr, "stderr")
        sys.argv.pop(0)
        runpy.run_path(sys.argv[0], run_name="__main__")
        """


@pytest.mark.parametrize("editor", STREAMS)
def test_streams_of_editors(editor, place):
    """The demo runs to its end where stdout and stderr are these, with no bar for a terminal."""
    if editor == "IDLE":
        pytest.importorskip("tkinter", reason="this Python has no IDLE")
    stdout, stderr = run_program(STREAMS[editor] + RUN, TRANSFER, "--demo", cwd=place)
    assert stderr == ""
    assert re.search(DEMO_ENDS, stdout)
    assert "\b" not in stdout
    check_demo(place)


def test_error_in_an_editor(tmp_path):
    program = STREAMS["Spyder and Thonny"] + RUN
    stdout, stderr = run_program(program, TRANSFER, "--epochs", 0, cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, "argument --epochs: '0' is not a whole number.+")


PYTHONW = """
        import os, runpy, sys

        sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None
        os.close(1)
        os.close(2)
        sys.argv.pop(0)
        runpy.run_path(sys.argv[0], run_name="__main__")
        """


@pytest.mark.skipif(os.name == "nt", reason="Windows has pythonw itself")
def test_without_any_stream(place):
    """As under pythonw, which has no console."""
    assert run_program(PYTHONW, TRANSFER, "--demo", cwd=place) == ("", "")
    check_demo(place)
    run_program(PYTHONW, TRANSFER, "--epochs", 0, cwd=place, status=2)


# ----- uv


def test_uv_run(place, monkeypatch):
    """It installs what the script says that it needs, and runs it."""
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    uv = pytest.importorskip("uv", reason="uv is not installed")
    command = [uv.find_uv_bin(), "run", "--python", sys.executable, TRANSFER, "--demo"]
    result = subprocess.run(command, cwd=place, capture_output=True, encoding="utf-8")
    if re.search("error sending request|Failed to fetch|dns error", result.stderr):
        pytest.skip(f"uv reaches no package registry: {result.stderr.splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    assert re.search(DEMO_ENDS, result.stdout)
    check_demo(place)
    command[4:] = [PREDICT, "--model", "demo/vgg16_cifar10.keras"]
    result = subprocess.run(command, cwd=place, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("予測: ")
