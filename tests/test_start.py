"""How a run starts: at once where it only answers, with one sentence where it cannot."""

import ast
import re
import shutil

import pytest
from conftest import PREDICT, ROOT, TRANSFER, call, check_error, needs_posix, read_history, run

import transfer_vgg16

# ----- answers


@pytest.mark.slow
@pytest.mark.parametrize("script", [TRANSFER, PREDICT])
def test_help_and_a_mistyped_argument(script, tmp_path):
    stdout, stderr = run(script, "--help", cwd=tmp_path)
    assert stderr == ""
    assert "--data" in stdout
    stdout, stderr = run(script, "--dataa", "x", cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(
        stderr, r"(unrecognized arguments: --dataa x|.+) \(--help explains the arguments\)"
    )


def test_help_explains_every_argument(capsys):
    with pytest.raises(SystemExit, match="0"):
        transfer_vgg16.main(["--help"])
    stdout = capsys.readouterr().out
    text = (ROOT / "transfer_vgg16.py").read_text(encoding="utf-8")
    flags = set(re.findall(r'^    add\(\s*"(--[a-z-]+)"', text, re.M))
    assert len(flags) > 15
    for flag in flags:
        line = re.search(rf"^  {flag}\b.*(\n {{10,}}.+)*", stdout, re.M)[0]
        assert len(line.split()) > 3, line


# ----- libraries that cannot be imported


def fake_tensorflow(directory, text):
    """Put a module that does as `text` says before TensorFlow; return the setting for `run`."""
    (directory / "tensorflow.py").write_text(text)
    return {"PYTHONPATH": str(directory)}


@pytest.mark.parametrize("script", [TRANSFER, PREDICT])
@pytest.mark.parametrize(
    "error",
    [
        "ImportError('cannot open a library')",
        "RuntimeError('the plug-in is broken\\nand more')",
        "OSError('libmetal is gone')",
        "AttributeError('no such symbol')",
    ],
)
def test_import_that_fails_is_one_sentence(error, script, tmp_path):
    fake = fake_tensorflow(tmp_path, f"raise {error}")
    stdout, stderr = run(script, cwd=tmp_path, status=2, **fake)
    assert stdout == ""
    reason = re.search(r"'([^'\\\n]+)", error)[1]
    check_error(
        stderr, rf"a package is missing or broken \({reason}\): activate .venv and run pip .+"
    )


@pytest.mark.slow
def test_library_that_is_missing_is_one_sentence(tmp_path):
    (tmp_path / "psutil.py").write_text("raise ModuleNotFoundError(\"No module named 'psutil'\")")
    _, stderr = run(TRANSFER, cwd=tmp_path, status=2, PYTHONPATH=str(tmp_path))
    check_error(stderr, r"a package .+ \(No module named 'psutil'\): activate .venv .+")


@needs_posix
@pytest.mark.parametrize("script", [TRANSFER, PREDICT])
def test_abort_of_tensorflow_shows_its_reason(script, tmp_path):
    """As on a CPU without AVX; nothing of Python runs any more."""
    text = "import os\nos.write(2, b'your CPU has no AVX\\n')\nos.abort()"
    _, stderr = run(script, cwd=tmp_path, status=-6, **fake_tensorflow(tmp_path, text))
    assert stderr == "your CPU has no AVX\n"


@pytest.mark.slow
@pytest.mark.parametrize("safe_path", ["", "1"], ids=["usual path", "python -P"])
@pytest.mark.parametrize("script", [TRANSFER, PREDICT])
def test_modules_beside_the_scripts_replace_no_others(script, safe_path, tmp_path):
    """As the random.py of an exercise does, which all that imports `random` would get."""
    for name in (TRANSFER, PREDICT):
        shutil.copy(name, tmp_path)
    for name in ("random", "signal", "numpy", "tensorflow"):
        (tmp_path / f"{name}.py").write_text("print('mine')")
    stdout, stderr = run(
        *(tmp_path / script.name, "--model" if script is PREDICT else "--data", "missing"),
        cwd=tmp_path,
        status=2,
        PYTHONPATH="",
        PYTHONSAFEPATH=safe_path,
    )
    assert "mine" not in stdout
    check_error(stderr, r"missing does not exist: .+")


# ----- settings of the computer


@pytest.mark.slow
def test_keras_json_does_no_harm(few, weights, tmp_path):
    """Whatever it says, the numbers are the same."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "keras.json").write_text(
        '{"floatx": "float16", "epsilon": 1e-07, "backend": "jax", '
        '"image_data_format": "channels_first"}'
    )
    arguments = ["--data", few, "--weights", weights, "--epochs", 2]
    _, stderr = run(TRANSFER, *arguments, cwd=tmp_path, KERAS_HOME=str(home))
    assert stderr == ""
    history = read_history(tmp_path)
    stdout, _ = run(PREDICT, "--data", few, cwd=tmp_path, KERAS_HOME=str(home))
    assert stdout.splitlines()[-1].startswith("予測: ")
    call(TRANSFER, *arguments, cwd=tmp_path)
    assert read_history(tmp_path) == history


def test_one_line_says_on_what_it_computes(finished):
    _, stdout = finished
    assert len(re.findall(r"^Computing on the CPU, \d+ cores$", stdout, re.M)) == 1


@pytest.mark.parametrize("script", [TRANSFER, PREDICT])
def test_script_metadata_is_that_of_the_documents(script):
    """PEP 723: what `uv run` installs is what requirements.txt names, for the README's Pythons."""
    text = script.read_text(encoding="utf-8")
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.M)[1]
    block = re.sub("^# ?", "", block, flags=re.M)
    dependencies = ast.literal_eval(re.search(r"^dependencies = (\[.*?\])", block, re.M | re.S)[1])
    required = (ROOT / "requirements.txt").read_text().splitlines()
    assert dependencies == [line.split("#")[0].strip() for line in required]

    python = re.search(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"$', block, re.M)
    first, last = int(python[1]), int(python[2]) - 1
    assert f"3.{first} to 3.{last}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(
        rf"3\.{first}\s?[～〜から]+\s?3\.{last}",
        (ROOT / "README.ja.md").read_text(encoding="utf-8"),
    )
