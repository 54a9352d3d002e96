"""The frozen layers' outputs are kept, used again where they fit, and never where not."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import (
    FEATURES,
    PREDICT,
    TRANSFER,
    call,
    needs_posix,
    read_history,
    read_result,
    run,
    start,
)

import transfer_vgg16

KEPT = f"The outputs of block5_pool are in {FEATURES} ("
COMPUTED = "VGG16 up to block5_pool runs once over 300 images, for all epochs:"


@pytest.fixture(scope="module")
def first(handful, weights, tmp_path_factory):
    """A directory with the features of a first run, and that run's arguments."""
    directory = tmp_path_factory.mktemp("first")
    arguments = ["--data", handful, "--weights", weights, "--epochs", 2]
    stdout, _ = call(TRANSFER, *arguments, cwd=directory)
    assert COMPUTED in stdout
    assert KEPT in stdout
    return directory, arguments


@pytest.fixture
def again(first, tmp_path):
    """A copy of that directory for one more run, and the arguments."""
    directory, arguments = first
    shutil.copytree(directory, tmp_path / "again")
    return tmp_path / "again", arguments


def check_taken(stdout):
    assert KEPT in stdout
    assert "runs once" not in stdout


def run_fresh(tmp_path, arguments):
    """Return the history of a run that has no features to use."""
    (tmp_path / "fresh").mkdir()
    stdout, _ = call(TRANSFER, *arguments, cwd=tmp_path / "fresh")
    assert COMPUTED in stdout
    return read_history(tmp_path / "fresh")


def test_another_learning_rate_uses_them(again, tmp_path):
    directory, arguments = again
    arguments = [*arguments, "--learning-rate", "1e-3"]
    stdout, stderr = call(TRANSFER, *arguments, cwd=directory)
    check_taken(stdout + stderr)
    assert read_history(directory) == run_fresh(tmp_path, arguments)


def test_same_content_in_other_files_uses_them(again, handful, weights, tmp_path):
    directory, _ = again
    shutil.copy(handful, tmp_path / "copy.npz")
    shutil.copy(weights, tmp_path / "copy.weights.h5")
    arguments = ["--data", tmp_path / "copy.npz", "--weights", tmp_path / "copy.weights.h5"]
    check_taken(call(TRANSFER, *arguments, "--epochs", 1, cwd=directory)[0])


def test_thawed_runs_keep_a_second_file(again, tmp_path):
    """It holds what goes into the thawed blocks, and the first one still serves the head."""
    directory, arguments = again
    before = (directory / FEATURES).read_bytes()
    arguments = [*arguments, "--unfreeze", 1, "--fine-tune-epochs", 1]
    stdout, _ = call(TRANSFER, *arguments, cwd=directory)
    assert COMPUTED not in stdout
    assert "VGG16 up to block4_pool runs once over 300 images" in stdout
    assert "The outputs of block4_pool are in vgg16_block4_pool.features" in stdout
    assert (directory / FEATURES).read_bytes() == before
    history = read_history(directory)

    check_taken(call(TRANSFER, *arguments, cwd=directory)[0])
    assert read_history(directory) == history
    assert history == run_fresh(tmp_path, arguments)


def change_image(arguments, tmp_path):
    with np.load(arguments[1]) as file:
        data = dict(file)
    data["x_test"][-1, -1, -1, -1] ^= 1
    np.savez(tmp_path / "changed.npz", **data)
    return ["--data", tmp_path / "changed.npz", *arguments[2:]]


def change_weight(arguments, tmp_path):
    base = keras.applications.VGG16(
        include_top=False, weights=str(arguments[3]), input_shape=(32, 32, 3)
    )
    bias = base.get_layer("block3_conv2").bias
    values = bias.numpy()
    values[0] += 1
    bias.assign(values)
    base.save_weights(tmp_path / "changed.weights.h5")
    return [*arguments[:3], tmp_path / "changed.weights.h5", *arguments[4:]]


def change_precision(arguments, tmp_path):
    return [*arguments, "--precision", "mixed_bfloat16"]


def change_preprocessing(arguments, tmp_path):
    return [*arguments, "--preprocess"]


def change_size(arguments, tmp_path):
    return [*arguments, "--image-size", 40]


@pytest.mark.parametrize(
    "change", [change_image, change_weight, change_precision, change_preprocessing, change_size]
)
def test_old_features_are_never_served(change, again, tmp_path):
    directory, arguments = again
    arguments = change(arguments, tmp_path)
    stdout, _ = call(TRANSFER, *arguments, cwd=directory)
    assert COMPUTED in stdout
    assert read_history(directory) == run_fresh(tmp_path, arguments)
    check_taken(call(TRANSFER, *arguments, cwd=directory)[0])


@pytest.mark.slow
def test_edited_script_computes_again(again, tmp_path):
    """Readers are asked to change main(): here, how the images are enlarged."""
    directory, arguments = again
    arguments = [*arguments, "--image-size", 40]
    call(TRANSFER, *arguments, cwd=directory)
    text, before = (
        TRANSFER.read_text(encoding="utf-8"),
        "Resizing(args.image_size, args.image_size)",
    )
    assert text.count(before) == 1
    edited = tmp_path / "edited.py"
    edited.write_text(text.replace(before, 'Resizing(40, 40, "nearest")'), encoding="utf-8")
    stdout, stderr = run(edited, *arguments, cwd=directory)
    assert stderr == ""
    assert COMPUTED in stdout
    assert read_history(directory) != run_fresh(tmp_path, arguments)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def cut_the_key(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"0" * 32)


def damage_the_key(path):
    path.write_bytes(path.read_bytes()[:-32] + b"0" * 32)


def replace_with_text(path):
    path.write_text("no outputs")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "harm", [truncate, cut_the_key, lengthen, damage_the_key, replace_with_text, empty]
)
def test_damaged_or_foreign_file_is_computed_again(harm, again, first):
    directory, arguments = again
    harm(directory / FEATURES)
    stdout, stderr = call(TRANSFER, *arguments, cwd=directory)
    assert COMPUTED in stdout
    assert stderr == ""
    assert read_history(directory) == read_history(first[0])
    check_taken(call(TRANSFER, *arguments, cwd=directory)[0])


@pytest.mark.slow
@needs_posix
def test_run_that_is_killed_half_way_leaves_the_former_file(subset, weights, tmp_path, finished):
    """Early, late, and at a random moment; the next run does as if there had been none."""
    (tmp_path / FEATURES).write_text("of a former run")
    arguments = ["--data", subset, "--weights", weights, "--epochs", 3]
    size = (finished[0] / FEATURES).stat().st_size
    for share in (0, 0.8 * random.random(), 0.8):
        process = start(TRANSFER, *arguments, cwd=tmp_path)
        while not any(
            path.stat().st_size > share * size
            for path in tmp_path.glob(f"part-*-{process.pid}-{FEATURES}")
        ):
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert (tmp_path / FEATURES).read_text() == "of a former run"
    stdout, _ = call(TRANSFER, *arguments, cwd=tmp_path)
    assert "runs once" in stdout
    assert not list(tmp_path.glob("part-*"))
    assert read_history(tmp_path) == read_history(finished[0])


def test_parts_of_killed_runs_make_room_first(tmp_path):
    """Whatever they were to become, and before the free disk is looked at."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    left = tmp_path / f"part-{host}-{dead.pid}-vgg16_block3_pool.features"
    others = [tmp_path / f"part-{host}-{os.getpid()}-x", tmp_path / f"part-other-{dead.pid}-x"]
    for path in (left, *others):
        path.touch()
    transfer_vgg16.import_libraries()
    transfer_vgg16.make_output_dir(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_precision(precision, first, tmp_path):
    """The head stays in float32."""
    directory, arguments = first
    stdout, stderr = call(TRANSFER, *arguments, "--precision", precision, cwd=tmp_path)
    assert stderr == ""
    size = 300 * 512 * 2 + 32  # two bytes a number
    assert (tmp_path / FEATURES).stat().st_size == size
    model = keras.models.load_model(tmp_path / "vgg16_cifar10.keras")
    policies = [layer.dtype_policy.name for layer in model.layers]
    assert set(policies[1:19]) == {precision}
    assert set(policies[19:]) == {"float32"}

    result = read_result(stdout)
    exact = read_result(call(TRANSFER, *arguments, cwd=directory)[0])
    assert result[0] == pytest.approx(exact[0], rel=0.02)
    stdout, _ = call(PREDICT, *arguments[:2], cwd=tmp_path)
    assert read_result(stdout) == pytest.approx(result, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_precision_without_the_fast_path(precision, first, tmp_path):
    """The model answers alike where the CPU has none."""
    _, arguments = first
    stdout, _ = call(TRANSFER, *arguments, "--precision", precision, cwd=tmp_path)
    result = read_result(stdout)
    stdout, _ = run(PREDICT, *arguments[:2], cwd=tmp_path, TF_ENABLE_ONEDNN_OPTS="0")
    assert read_result(stdout) == pytest.approx(result, rel=0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_outputs_are_let_go_when_a_run_ends(again):
    """So a second run in a notebook can replace their file where Windows would keep it."""
    directory, arguments = again
    call(TRANSFER, *arguments, cwd=directory)
    assert str(directory) not in Path("/proc/self/maps").read_text()
