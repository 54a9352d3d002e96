"""The lesson: both notebooks have the same code, run whole, and give the article's numbers."""

import ast
import json
import os
import re

import numpy as np
import pytest
from conftest import ARTICLE, ROOT, read_figures, read_result, run
from test_article import FULL_HISTORY, FULL_RESULT

EXECUTE = ROOT / "tests" / "execute_lesson.py"
NOTEBOOKS = ["lesson.ipynb", os.path.join("ja", "lesson.ipynb")]
each_notebook = pytest.mark.parametrize("name", NOTEBOOKS, ids=["English", "Japanese"])


def read_cells(directory, name, kind="code"):
    """Return the cells of one kind of a notebook, as dicts with their text in "source"."""
    notebook = json.loads((directory / name).read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == kind]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def find_cell(directory, name, text):
    """Return the one code cell that has `text` in it."""
    (cell,) = [cell for cell in read_cells(directory, name) if text in cell["source"]]
    return cell


def printed(cell):
    """Return what a cell printed."""
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def read_history(directory, name):
    """Return accuracy, loss, val_accuracy and val_loss of each epoch as printed, (epochs, 4)."""
    text = printed(find_cell(directory, name, "history = fast.fit("))
    numbers = r"accuracy: (\S+) - loss: (\S+) - val_accuracy: (\S+) - val_loss: (\S+)$"
    return np.array(re.findall(numbers, text, re.MULTILINE), float)


def read_test_result(directory, name):
    """Return the loss and accuracy on the test images as printed."""
    return read_result(printed(find_cell(directory, name, "result = fast.evaluate(")))


def test_both_languages_have_the_same_code():
    """But for comments, which a syntax tree does not have."""
    inputtransformer = pytest.importorskip("IPython.core.inputtransformer2")
    python = inputtransformer.TransformerManager().transform_cell  # of !git and the like
    english, japanese = (read_cells(ROOT / "docs", name) for name in NOTEBOOKS)
    assert len(english) == len(japanese)
    for ours, theirs in zip(english, japanese, strict=True):
        trees = [ast.dump(ast.parse(python(cell["source"]))) for cell in (ours, theirs)]
        assert trees[0] == trees[1], ours["source"]


def test_both_languages_have_the_same_headings():
    headings = []
    for name in NOTEBOOKS:
        cells = read_cells(ROOT / "docs", name, "markdown")
        headings.append([re.findall("^#+ ", cell["source"], re.MULTILINE) for cell in cells])
    assert headings[0] == headings[1]


@each_notebook
def test_stored_outputs(name):
    cells = read_cells(ROOT / "docs", name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 8
    assert not re.search(r"(/tmp|/home|/root|/Users|[A-Z]:\\)", "".join(map(printed, cells)))
    assert (ROOT / "docs" / name).stat().st_size < 2e6


@each_notebook
def test_stored_numbers_are_the_plain_code_s(name):
    np.testing.assert_allclose(read_history(ROOT / "docs", name), FULL_HISTORY, atol=1e-4)
    assert read_test_result(ROOT / "docs", name) == pytest.approx(FULL_RESULT, abs=1e-4)


def execute(name, directory, *arguments):
    """Execute a notebook, without a network, into `directory`."""
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    nothing = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    command = [EXECUTE, ROOT / "docs" / name, "--output-dir", directory, *arguments]
    run(*command, cwd=directory, **nothing)


@pytest.mark.slow
def test_runs_without_a_network(tmp_path):
    """On the drawings, from the first cell to the last; a cell's error would end it."""
    english, _ = NOTEBOOKS
    execute(english, tmp_path)
    loaded = printed(find_cell(tmp_path, english, "cifar10.load_data()"))
    assert loaded.count(" failed (") == 3  # and so the drawings were taken
    last = printed(read_cells(tmp_path, english)[-1])
    assert 0 <= read_result(last)[1] <= 1


@pytest.mark.slow
def test_numbers_are_those_of_the_plain_code(subset, weights, tmp_path):
    """On a few images, the article's ten epochs and the test."""
    _, japanese = NOTEBOOKS
    inputs = ("--data", subset, "--weights", weights)
    execute(japanese, tmp_path, *inputs, "--until", "result = fast.evaluate(")
    stdout, _ = run(ARTICLE, subset, weights, cwd=tmp_path)
    history = read_history(tmp_path, japanese)
    assert len(history) == 10
    np.testing.assert_allclose(history, read_figures(tmp_path), rtol=0, atol=1.1e-4)
    assert read_test_result(tmp_path, japanese) == pytest.approx(read_result(stdout), abs=1e-4)
