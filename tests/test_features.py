"""The features of the frozen base are kept, used again where they fit, and never where not."""

import shutil

import keras
import numpy as np
import pytest
from conftest import PREDICT, TRANSFER, read_history, read_result, run

TAKEN = "The features of 300 images are taken from vgg16_features.npz"
COMPUTED = "VGG16 runs once over 300 images"
NOT_USED = "vgg16_features.npz is not used: "


@pytest.fixture(scope="module")
def first(handful, weights, tmp_path_factory):
    """A directory with the features of a first run, and that run's arguments."""
    directory = tmp_path_factory.mktemp("first")
    arguments = ["--data", handful, "--weights", weights, "--epochs", 2]
    stdout, _ = run(TRANSFER, *arguments, cwd=directory)
    assert COMPUTED in stdout
    return directory, arguments


@pytest.fixture
def again(first, tmp_path):
    """A copy of that directory for one more run, and the arguments."""
    directory, arguments = first
    shutil.copytree(directory, tmp_path / "again")
    return tmp_path / "again", arguments


def run_fresh(tmp_path, arguments):
    """Return the history of a run that has no features to use."""
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    run(TRANSFER, *arguments, cwd=fresh)
    return read_history(fresh)


def test_another_learning_rate_uses_them(again, tmp_path):
    directory, arguments = again
    arguments = [*arguments, "--learning-rate", "1e-3"]
    stdout, stderr = run(TRANSFER, *arguments, cwd=directory)
    assert TAKEN in stdout
    assert COMPUTED not in stdout + stderr
    assert read_history(directory) == run_fresh(tmp_path, arguments)


def test_same_content_in_other_files_uses_them(again, handful, weights, tmp_path):
    directory, _ = again
    shutil.copy(handful, tmp_path / "copy.npz")
    shutil.copy(weights, tmp_path / "copy.weights.h5")
    arguments = ["--data", tmp_path / "copy.npz", "--weights", tmp_path / "copy.weights.h5"]
    assert TAKEN in run(TRANSFER, *arguments, "--epochs", 1, cwd=directory)[0]


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


@pytest.mark.parametrize(
    "change", [change_image, change_weight, change_precision, change_preprocessing]
)
def test_old_features_are_never_served(change, again, tmp_path):
    directory, arguments = again
    arguments = change(arguments, tmp_path)
    stdout, _ = run(TRANSFER, *arguments, cwd=directory)
    assert NOT_USED + "it was made with other images, weights or arguments" in stdout
    assert COMPUTED in stdout
    assert read_history(directory) == run_fresh(tmp_path, arguments)
    assert TAKEN in run(TRANSFER, *arguments, cwd=directory)[0]


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def replace_with_arrays(path):
    np.savez(path, features=np.zeros(3))


def replace_with_text(path):
    path.write_text("not an archive")


@pytest.mark.parametrize("harm", [damage, truncate, replace_with_arrays, replace_with_text])
def test_damaged_or_foreign_file_is_computed_again(harm, again, first):
    directory, arguments = again
    harm(directory / "vgg16_features.npz")
    stdout, stderr = run(TRANSFER, *arguments, cwd=directory)
    assert NOT_USED + "it is damaged, or another program's" in stdout
    assert COMPUTED in stdout
    assert stderr == ""
    assert read_history(directory) == read_history(first[0])
    assert TAKEN in run(TRANSFER, *arguments, cwd=directory)[0]


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_precision(precision, first, tmp_path):
    """The head stays in float32; the model answers alike where the CPU has no fast path."""
    directory, arguments = first
    stdout, stderr = run(TRANSFER, *arguments, "--precision", precision, cwd=tmp_path)
    assert stderr == ""
    model = keras.models.load_model(tmp_path / "vgg16_cifar10.keras")
    policies = [layer.dtype_policy.name for layer in model.layers]
    assert set(policies[1:19]) == {precision}
    assert set(policies[19:]) == {"float32"}

    loss, _ = result = read_result(stdout)
    assert loss == pytest.approx(read_result(run_again(first))[0], rel=0.02)
    stdout, _ = run(PREDICT, *arguments[:2], cwd=tmp_path)
    assert read_result(stdout) == pytest.approx(result, rel=1e-4)
    stdout, _ = run(PREDICT, *arguments[:2], cwd=tmp_path, TF_ENABLE_ONEDNN_OPTS="0")
    assert read_result(stdout) == pytest.approx(result, rel=0.02)


def run_again(first):
    directory, arguments = first
    return run(TRANSFER, *arguments, cwd=directory)[0]
