"""What Windows, macOS, WSL2 and Colab do otherwise than the Linux on which the tests usually run.

Each situation is made by hand: a system that refuses a call, a library that does not load, a
module or a file that is only there on such a computer.
"""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import types
import unicodedata
import zipfile
from pathlib import Path

import keras
import matplotlib
import pytest
from conftest import check_error, make_model, needs_posix
from PIL import Image
from tensorflow.python import pywrap_tensorflow
from test_folders import make

import predict_saved
import transfer_vgg16

# ----- libraries that do not load

WINDOWS_SAYS = "DLL load failed while importing _pywrap_tensorflow_internal: ルーチンの失敗"
MACOS_SAYS = "dlopen(/a/tensorflow-plugins/libmetal_plugin.dylib, 6): Symbol not found: _TF_X"


class Broken:
    """An importer whose `name` does not load."""

    def __init__(self, name, message):
        self.name, self.message = name, message

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise ImportError(self.message)


def explain(error, capsys):
    """Return what is printed where an import inside of quiet_import() raises `error`."""
    with pytest.raises(SystemExit) as stop, transfer_vgg16.quiet_import():
        raise error
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    check_error(printed, "a package is missing or broken .+")
    return printed


def test_tensorflow_s_dll_does_not_load(monkeypatch, capsys):
    """TensorFlow's own code raises an error whose text is a whole traceback."""
    name = "tensorflow.python._pywrap_tensorflow_internal"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(name, WINDOWS_SAYS), *sys.meta_path])
    code = Path(pywrap_tensorflow.__file__).read_text(encoding="utf-8")
    with pytest.raises(ImportError) as found:
        exec(compile(code, "pywrap_tensorflow.py", "exec"), {})
    assert str(found.value).startswith("Traceback (most recent call last):")
    printed = explain(found.value, capsys)
    assert f"({WINDOWS_SAYS}): install the Microsoft Visual C++ Redistributable, " in printed
    assert "https://aka.ms/vs/17/release/vc_redist.x64.exe" in printed.split()
    assert "AVX" in printed


def test_a_plug_in_that_does_not_fit_tensorflow(capsys):
    printed = explain(OSError(f"{MACOS_SAYS}\n  Referenced from: ..."), capsys)
    assert f"({MACOS_SAYS}): pip uninstall tensorflow-metal" in printed


def test_a_cause_that_is_no_import_is_not_shown(capsys):
    error = RuntimeError("the plug-in is broken")
    error.__cause__ = KeyError("x")
    assert "(the plug-in is broken): activate .venv and run pip install" in explain(error, capsys)


# ----- notebooks in which something else ran before


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (keras.backend, "backend", lambda: "jax"),
        (transfer_vgg16.tf, "__version__", "2.19.0"),
    ],
)
def test_libraries_of_an_earlier_cell(module, name, value, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", sys)  # a notebook
    monkeypatch.setattr(module, name, value)
    with pytest.raises(transfer_vgg16.Failure, match="restart the kernel .+, and run this first"):
        transfer_vgg16.start_clean()


@pytest.mark.parametrize("installed", ["2.22.0rc1", "2.22.0+nv26.10", None])
def test_libraries_that_fit(installed, monkeypatch):
    """A version may be written in two ways; tensorflow-cpu and others hold TensorFlow, too."""

    def version(name):
        if installed is None:
            raise transfer_vgg16.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setitem(sys.modules, "ipykernel", sys)  # a notebook
    monkeypatch.setattr(transfer_vgg16.metadata, "version", version)
    monkeypatch.setattr(transfer_vgg16.tf, "__version__", "2.22.0-rc1")
    transfer_vgg16.check_session()


# ----- figures


@pytest.mark.pictures
def test_tkinter_that_opens_no_window(tmp_path, monkeypatch, capsys):
    """As Python 3.13.0's in a virtual environment: the figures are drawn, and a line says so."""
    tkinter = pytest.importorskip("tkinter", reason="this Python has no tkinter")
    plt, message = transfer_vgg16.plt, "Can't find a usable init.tcl in the following directories:"

    def open_window(*arguments, **settings):
        raise tkinter.TclError(f"{message}\n    C:/python313/lib/tcl8.6")

    monkeypatch.setattr(tkinter, "Tk", open_window)
    monkeypatch.setattr(matplotlib.cbook, "_get_running_interactive_framework", lambda: None)
    plt.switch_backend("TkAgg")  # as if there were a screen
    try:
        transfer_vgg16.draw_blocks(make_model(), tmp_path / "blocks.png")
        transfer_vgg16.plot_history({"loss": [2.0, 1.0]}, tmp_path)
        transfer_vgg16.show_figures()
    finally:
        plt.switch_backend("agg")
    assert capsys.readouterr().out == f"Figures are saved, but not shown ({message})\n"
    assert Image.open(tmp_path / "blocks.png").size == (1600, 600)
    assert Image.open(tmp_path / "loss.png").size == (900, 600)


def test_program_of_another_python_does_not_draw(tmp_path, monkeypatch):
    """Of a package that another version has, pyenv puts a script into PATH that only fails."""
    scripts = sysconfig.get_path("scripts")
    own = shutil.which("graphviz-pure", path=scripts)
    if own is None:
        pytest.skip("graphviz-pure is not installed beside this Python")
    shim = tmp_path / Path(own).name
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert shutil.which("graphviz-pure") == str(shim)
    called = []
    graph = types.SimpleNamespace(create_png=lambda prog: called.append(prog) or b"")
    monkeypatch.setattr(keras.utils, "model_to_dot", lambda model, show_shapes: graph)
    transfer_vgg16.draw_model(make_model(), tmp_path / "model.png")
    assert called == [own]


# ----- names as macOS writes them


def test_file_names_in_figures(monkeypatch):
    """か and its mark are two characters there, and one in fonts."""
    composed = "がぱ.jpg"
    without_marks = set(map(ord, composed))
    monkeypatch.setattr(transfer_vgg16, "font_characters", lambda: without_marks)
    assert transfer_vgg16.drawable([unicodedata.normalize("NFD", composed)]) == [composed]


# ----- directories of Windows


def test_output_directory_in_which_no_file_can_be_made(tmp_path, monkeypatch):
    """Windows says that it can be written, refuses each file, and tempfile tries other names."""
    tried = []

    def refuse(original):
        def open_file(file, *arguments, **settings):
            if tmp_path in Path(file).parents:
                tried.append(file)
                assert len(tried) < 100, "it does not give up"
                raise PermissionError(13, "Permission denied")
            return original(file, *arguments, **settings)

        return open_file

    monkeypatch.setattr(os, "open", refuse(os.open))
    monkeypatch.setattr(io, "open", refuse(io.open))
    monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", False)  # as there
    monkeypatch.setattr(tempfile, "_os", types.SimpleNamespace(**vars(os) | {"name": "nt"}))
    sentence = r"nothing can be written into .+ \(Permission denied\): choose another --output-dir"
    with pytest.raises(transfer_vgg16.Failure, match=sentence):
        transfer_vgg16.make_output_dir(tmp_path)
    assert len(tried) == 1


def test_nothing_is_left_of_the_trial(tmp_path):
    transfer_vgg16.make_output_dir(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []


def test_a_whole_drive_of_photos(tmp_path, monkeypatch, capsys):
    """Windows lets nobody list one of its own directories on each drive."""
    make(tmp_path, "cat/*.jpg 9\ndog/*.jpg 9\n$RECYCLE.BIN/S-1-5-21/$R*.jpg 9")
    make(tmp_path / "System Volume Information", "*.jpg 9")
    listing = os.scandir

    def list_directory(path):
        if "System Volume" in str(path):
            raise PermissionError(13, "Access is denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", list_directory)
    files, class_names = transfer_vgg16.find_photos(tmp_path)
    assert class_names == ["cat", "dog"]
    assert len(set(files["train"] + files["validation"] + files["test"])) == 18
    printed = capsys.readouterr().out
    assert "left aside: $RECYCLE.BIN, System Volume Information (hidden, or the" in printed
    assert "denied" not in printed


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("pets/*", {"cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "new.jpg"}),
        ("pets/*/a.jpg", {"cat/a.jpg", "dog/a.jpg"}),
        ("pets/?og/*.jpg", {"dog/a.jpg"}),
        ("p*s/new.jpg", {"new.jpg"}),
        ("pets/new[1].jpg", {"new[1].jpg"}),
        ("pets/new[1]*.jpg", {"new[1].jpg"}),
        ("pets/**.jpg", {"new.jpg"}),
    ],
)
def test_patterns_that_cmd_does_not_expand(pattern, expected, tmp_path, capsys):
    """They name what a shell on Linux would name; directories are searched."""
    make(tmp_path / "pets", "cat/a.jpg\ncat/b.jpg\ndog/a.jpg\nnew.jpg\n.hidden.jpg")
    if "[" in pattern:
        make(tmp_path / "pets", "new[1].jpg")
    files = predict_saved.list_pictures([tmp_path / pattern])
    found = {path.relative_to(tmp_path / "pets").as_posix() for path in files}
    assert found == expected
    searched = capsys.readouterr().out.count("pictures, 0 other files")
    assert searched == (2 if pattern == "pets/*" else 0)


def test_pattern_that_names_nothing_is_told_as_it_is(tmp_path):
    pattern = tmp_path / "pets" / "*.jpg"
    assert predict_saved.list_pictures([pattern]) == [pattern]


# ----- other programs that hold a file


def test_program_that_holds_the_part_file(tmp_path, monkeypatch):
    """A scanner reads it before the notes are added; the model is whole, with its notes."""
    opening, refused = io.open, []

    def open_file(file, mode="r", *arguments, **settings):
        if mode == "r+b" and ".keras" in str(file) and len(refused) < 2:
            refused.append(file)
            raise PermissionError(13, "Permission denied")
        return opening(file, mode, *arguments, **settings)

    monkeypatch.setattr(io, "open", open_file)
    path = tmp_path / "model.keras"
    transfer_vgg16.save_model(make_model(), {"class_names": ["a", "b"]}, path, needed=True)
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    assert len(refused) == 2
    assert {"class_names.json", "config.json", "model.weights.h5"} <= names
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]


# ----- WSL2


@pytest.mark.parametrize("system", ["linux", "win32"])
def test_part_files_of_the_other_system(system, tmp_path):
    """WSL2 has its computer's name, and process numbers of its own."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    part = tmp_path / f"part-{socket.gethostname()}-{system}-{dead.pid}-a.keras"
    part.touch()
    transfer_vgg16.delete_partial(tmp_path)
    assert part.exists() == (system != sys.platform)


def computing_on(monkeypatch, capsys, *there):
    """Return the line about the devices of a computer which has the files `there`."""
    existing = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in there or existing(path))
    transfer_vgg16.use_devices(False)
    return capsys.readouterr().out.strip()


@needs_posix
@pytest.mark.parametrize("file", ["/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1"])
def test_gpu_that_tensorflow_does_not_see(file, monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    line = computing_on(monkeypatch, capsys, file)
    hint = 'for the NVIDIA GPU: pip install "tensorflow[and-cuda]"'
    assert re.fullmatch(rf"Computing on the CPU, \d+ cores \({re.escape(hint)}\)", line)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "GPU" not in computing_on(monkeypatch, capsys, file)


@needs_posix
def test_no_gpu_and_no_hint(monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for file in ("/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1"):
        if os.path.exists(file):
            pytest.skip("this computer has a GPU")
    assert re.fullmatch(r"Computing on the CPU, \d+ cores", computing_on(monkeypatch, capsys))
