"""Whole runs use the frozen layers' outputs again where they fit, and never where not.

What counts for that is tested in test_frozen_once.py, on small models.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import PREDICT, TRANSFER, call, needs_posix, read_history, read_result, run, start

import transfer_vgg16

PASS = r"The layers up to {} run over"


@pytest.fixture(scope="module")
def first(few, weights, shared):
    """A directory with the outputs of a first run, and the arguments of that run."""
    arguments = ["--data", few, "--weights", weights, "--epochs", 2]
    directory, stdout = shared("first", lambda place: call(TRANSFER, *arguments, cwd=place)[0])
    assert stdout.count(PASS.format("block5_pool")) == 3
    return directory, arguments


@pytest.fixture
def again(first, tmp_path):
    """A copy of that directory for one more run, and the arguments."""
    directory, arguments = first
    shutil.copytree(directory, tmp_path / "again")
    return tmp_path / "again", arguments


def test_another_learning_rate_uses_them(again, tmp_path):
    directory, arguments = again
    arguments = [*arguments, "--learning-rate", "1e-3"]
    stdout, _ = call(TRANSFER, *arguments, cwd=directory)
    assert "run over" not in stdout
    (tmp_path / "fresh").mkdir()
    call(TRANSFER, *arguments, cwd=tmp_path / "fresh")
    assert read_history(directory) == read_history(tmp_path / "fresh")


@pytest.mark.slow
def test_thawed_runs_keep_more_files(again):
    """They hold what goes into the thawed blocks; the first ones still serve the head."""
    directory, arguments = again
    before = {path.name for path in directory.glob("*.features")}
    arguments = [*arguments, "--unfreeze", 1, "--fine-tune-epochs", 1]
    stdout, _ = call(TRANSFER, *arguments, cwd=directory)
    assert PASS.format("block5_pool") not in stdout
    assert stdout.count(PASS.format("block4_pool")) == 3
    after = {path.name for path in directory.glob("*.features")}
    assert {name.split("-")[0] for name in after - before} == {"block4_pool"}
    assert after > before
    history = read_history(directory)
    stdout, _ = call(TRANSFER, *arguments, cwd=directory)
    assert "run over" not in stdout
    assert read_history(directory) == history


@pytest.mark.slow
def test_thawed_run_makes_both_in_one_pass(few, weights, tmp_path):
    """Only the blocks that are thawed later run over the outputs of those before."""
    arguments = ["--data", few, "--weights", weights, "--epochs", 1, "--unfreeze", 2]
    stdout, _ = call(TRANSFER, *arguments, "--fine-tune-epochs", 1, cwd=tmp_path)
    assert stdout.count(PASS.format("block3_pool")) == 3  # to train, validate, test with
    assert stdout.count(PASS.format("block5_pool")) == 2  # tested once all is trained


@pytest.mark.parametrize("flags", [["--preprocess"], ["--precision", "mixed_bfloat16"]])
def test_other_settings_replace_them(flags, again):
    directory, arguments = again
    before = {path.name for path in directory.glob("*.features")}
    stdout, _ = call(TRANSFER, *arguments, *flags, cwd=directory)
    assert stdout.count(PASS.format("block5_pool")) == 3
    after = {path.name for path in directory.glob("*.features")}
    assert len(after) == 3
    assert not after & before


@pytest.mark.slow
@needs_posix
def test_run_that_is_killed_half_way_is_gone_on_with(handful, weights, tmp_path):
    """Early, late, and at a random moment; the next run ends as if there had been none."""
    arguments = ["--data", handful, "--weights", weights, "--epochs", 3, "--image-size", 64]
    (tmp_path / "alone").mkdir()
    (tmp_path / "killed").mkdir()
    call(TRANSFER, *arguments, cwd=tmp_path / "alone")
    size = max(path.stat().st_size for path in (tmp_path / "alone").glob("*.features"))
    for share in (0, 0.7 * random.random(), 0.7):
        process = start(TRANSFER, *arguments, cwd=tmp_path / "killed")
        pattern = f"part-*-{process.pid}-block5_pool-*.features"
        written = -1
        while written <= share * size:
            assert process.poll() is None
            with contextlib.suppress(OSError):  # one that is whole has another name
                sizes = [path.stat().st_size for path in (tmp_path / "killed").glob(pattern)]
                written = max(sizes, default=-1)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not list((tmp_path / "killed").glob("block5_pool-*"))
    call(TRANSFER, *arguments, cwd=tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("part-*"))
    for path in (tmp_path / "alone").glob("*.features"):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()
    assert read_history(tmp_path / "alone") == read_history(tmp_path / "killed")


def test_parts_of_killed_runs_are_deleted_first(tmp_path):
    """Whatever they were to become, but for outputs, which a run goes on with."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours = transfer_vgg16.PARTIAL
    left = tmp_path / f"{ours}{dead.pid}-vgg16_cifar10.keras"
    others = [tmp_path / f"{ours}{os.getpid()}-x", tmp_path / f"part-other-{dead.pid}-x"]
    others.append(tmp_path / f"{ours}{dead.pid}-flatten-0123.features")
    for path in (left, *others):
        path.touch()
    transfer_vgg16.make_output_dir(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize(
    "precision", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)]
)
def test_precision(precision, first, tmp_path):
    """VGG16 alone computes in it; the model's answers stay about the same."""
    import keras

    directory, arguments = first
    stdout, stderr = call(TRANSFER, *arguments, "--precision", precision, cwd=tmp_path)
    assert stderr == ""
    sizes = sorted(path.stat().st_size for path in tmp_path.glob("*.features"))
    assert sizes == [count * 512 * 2 + 32 for count in (8, 20, 32)]  # two bytes a number
    model = keras.models.load_model(tmp_path / "vgg16_cifar10.keras")
    policies = [layer.dtype_policy.name for layer in model.layers]
    assert set(policies[1:19]) == {precision}
    assert set(policies[19:]) == {"float32"}
    result = read_result(stdout)
    exact = read_result(call(PREDICT, *arguments[:2], cwd=directory)[0])
    assert result[0] == pytest.approx(exact[0], rel=0.05)
    stdout, _ = call(PREDICT, *arguments[:2], cwd=tmp_path)
    assert read_result(stdout) == pytest.approx(result, rel=1e-3)


@pytest.mark.slow
def test_precision_without_a_fast_path(first, tmp_path):
    """A processor without bfloat16 gives about the same answers."""
    _, arguments = first
    stdout, _ = call(TRANSFER, *arguments, "--precision", "mixed_bfloat16", cwd=tmp_path)
    slow, _ = run(PREDICT, *arguments[:2], cwd=tmp_path, TF_ENABLE_ONEDNN_OPTS="0")
    assert np.isfinite(read_result(slow)).all()
    assert read_result(slow) == pytest.approx(read_result(stdout), rel=0.05)
