"""The two scripts do what the article shows, with its numbers."""

import hashlib
import re

import keras
import numpy as np
import pytest
from benchmark import save_part
from conftest import (
    ARTICLE,
    PREDICT,
    TRANSFER,
    WRITTEN,
    call,
    copy_features,
    list_written,
    make_model,
    read_figures,
    read_history,
    read_result,
    run,
)
from PIL import Image

import transfer_vgg16

# Measured with tests/article.py on a JPEG copy of CIFAR-10, seed 0:
# accuracy, loss, val_accuracy, val_loss of each epoch; then the test images' loss and accuracy.
FULL_HISTORY = [
    (0.3131, 4.2568, 0.4139, 1.7968),
    (0.3748, 1.9258, 0.4455, 1.6338),
    (0.4027, 1.7572, 0.4655, 1.5530),
    (0.4249, 1.6657, 0.4855, 1.5022),
    (0.4419, 1.6066, 0.4958, 1.4648),
    (0.4504, 1.5681, 0.5008, 1.4408),
    (0.4604, 1.5310, 0.5104, 1.4172),
    (0.4684, 1.5042, 0.5148, 1.3989),
    (0.4798, 1.4779, 0.5275, 1.3835),
    (0.4839, 1.4612, 0.5250, 1.3713),
]
FULL_RESULT = (1.3704, 0.5274)
JPEG_COPY_SHA256 = "5aaf8a2cf2e577ff4dbb15e4f368840fab5aca1812bcc69682005f8dc661d466"  # of x_train
NAMES = ["飛行機 (airplane)", "自動車 (automobile)", "鳥 (bird)", "猫 (cat)", "鹿 (deer)"]
NAMES += ["犬 (dog)", "蛙 (frog)", "馬 (horse)", "船 (ship)", "トラック (truck)"]


def test_parameter_counts(finished):
    _, stdout = finished
    assert re.search(r"Total params: 14,848,586 .*", stdout)
    assert re.search(r"\bTrainable params: 133,898 .*", stdout)
    assert re.search(r"Non-trainable params: 14,714,688 .*", stdout)


def test_files(finished):
    directory, _ = finished
    assert list_written(directory) == WRITTEN


def test_epochs_are_printed_and_kept(finished):
    directory, stdout = finished
    figures = read_figures(directory)
    printed = re.findall(
        r"accuracy: (\S+) - loss: (\S+) - val_accuracy: (\S+) - val_loss: (\S+)$", stdout, re.M
    )
    assert len(figures) == len(printed) == 3
    np.testing.assert_allclose(np.array(printed, float), figures, atol=5.1e-5)


@pytest.mark.parametrize("name", ["loss.png", "accuracy.png"])
def test_plots_show_both_curves(finished, name):
    directory, _ = finished
    pixels = np.asarray(Image.open(directory / name).convert("RGB")).astype(int)
    red, green, blue = np.moveaxis(pixels, -1, 0)
    assert ((red > 200) & (green < 80) & (blue < 80)).sum() > 200
    assert ((blue > 200) & (green < 80) & (red < 80)).sum() > 200


@pytest.mark.parametrize(
    "name", ["loss", "accuracy", "confusion_matrix", "mistakes", "predictions"]
)
def test_figures_show_something(finished, name):
    picture = Image.open(finished[0] / f"{name}.png").convert("L")
    assert min(picture.size) > 200
    assert np.asarray(picture).std() > 10


def test_model_picture_shows_all_layers(finished):
    directory, _ = finished
    picture = Image.open(directory / "transfer_learning_vgg16_cifar10.png").convert("L")
    dark = (np.asarray(picture) < 128).mean(axis=1) > 0.25  # rows through a box's black parts
    starts, ends = np.flatnonzero(np.diff(dark.astype(int))).reshape(-1, 2).T
    titles = np.count_nonzero(ends - starts > 100)
    assert titles == 23


def test_model_is_flat_and_its_base_untouched(finished, weights):
    directory, _ = finished
    model = keras.models.load_model(directory / "vgg16_cifar10.keras")
    base = keras.applications.VGG16(
        include_top=False, weights=str(weights), input_shape=(32, 32, 3)
    )
    names = [layer.name for layer in model.layers]
    assert names[1:19] == [layer.name for layer in base.layers[1:]]
    kinds = [type(layer).__name__ for layer in model.layers[19:]]
    assert kinds == ["Flatten", "Dense", "Dropout", "Dense"]
    assert [layer.trainable for layer in model.layers[1:]] == [False] * 18 + [True] * 4
    for layer, original in zip(model.layers[1:19], base.layers[1:], strict=True):
        for ours, theirs in zip(layer.get_weights(), original.get_weights(), strict=True):
            assert np.array_equal(ours, theirs)


def test_saved_model_is_the_best_epoch(finished, subset, tmp_path):
    """The companion, given the validation images as its test images, prints the best epoch."""
    directory, _ = finished
    with np.load(subset) as file:
        data = dict(file)
    data["x_test"], data["y_test"] = data["x_train"][:50], data["y_train"][:50]
    np.savez(tmp_path / "validation.npz", **data)
    stdout, stderr = call(PREDICT, "--data", tmp_path / "validation.npz", cwd=directory)
    assert stderr == ""
    best = min(read_history(directory), key=lambda row: row["val_loss"])
    assert read_result(stdout) == pytest.approx([best["val_loss"], best["val_accuracy"]], abs=1e-4)


def test_companion_agrees_with_keras(finished, subset, tmp_path):
    directory, stdout = finished
    path = directory / "vgg16_cifar10.keras"
    printed, _ = call(PREDICT, "--model", path, "--data", subset, cwd=tmp_path)
    model = keras.models.load_model(path)
    with np.load(subset) as file:
        images, labels = file["x_test"], file["y_test"]
    expected = model.evaluate(images, labels, verbose=0)
    assert read_result(printed) == pytest.approx(expected, abs=1e-5)
    probabilities = model.predict(images[:1])[0]
    assert f"予測: {probabilities.argmax()}, 正解: {labels[0]}\n" in printed
    history = read_history(directory)
    if history[-1] == min(history, key=lambda row: row["val_loss"]):
        assert read_result(stdout) == pytest.approx(read_result(printed), abs=1e-4)


def test_prediction_in_numbers_and_words(finished, images):
    _, stdout = finished
    *_, number, words = stdout.splitlines()
    label = images["y_test"][0, 0]
    predicted = int(re.fullmatch(rf"予測: (\d), 正解: \[{label}\]", number)[1])
    assert words == f"予測: {NAMES[predicted]}, 正解: {NAMES[label]}"


@pytest.fixture(scope="module")
def article(subset, weights, shared):
    """Three epochs of the article's plain code on the subset."""
    return shared("article", lambda directory: run(ARTICLE, subset, weights, 3, cwd=directory)[0])


def test_numbers_are_those_of_the_plain_code(finished, article):
    np.testing.assert_allclose(
        read_figures(finished[0]), read_figures(article[0]), rtol=0, atol=1e-4
    )
    assert read_result(finished[1]) == pytest.approx(read_result(article[1]), abs=1e-4)


def test_end_to_end_gives_the_same_numbers(article, subset, weights, tmp_path):
    arguments = ["--data", subset, "--weights", weights, "--epochs", 3, "--end-to-end"]
    stdout, stderr = call(TRANSFER, *arguments, cwd=tmp_path)
    assert stderr == ""
    np.testing.assert_allclose(read_figures(tmp_path), read_figures(article[0]), rtol=0, atol=1e-4)
    assert read_result(stdout) == pytest.approx(read_result(article[1]), abs=1e-4)
    assert not list(tmp_path.glob("*.features"))


def test_seed_decides_the_numbers(finished, subset, weights, tmp_path):
    """In a process of its own, and where others ran before."""
    arguments = ["--data", subset, "--weights", weights, "--epochs", 3]
    copy_features(finished[0], tmp_path)
    call(TRANSFER, *arguments, cwd=tmp_path)
    assert read_history(tmp_path) == read_history(finished[0])
    call(TRANSFER, *arguments, "--seed", 1, cwd=tmp_path)
    assert read_history(tmp_path) != read_history(finished[0])


def test_weights_as_keras_keeps_them(weights, tmp_path):
    """Keras downloads the weights in its older .h5 format."""
    base = keras.applications.VGG16(
        include_top=False, weights=str(weights), input_shape=(32, 32, 3)
    )
    base.save(tmp_path / "older.h5")
    again = keras.applications.VGG16(
        include_top=False,
        weights=transfer_vgg16.find_weights(tmp_path / "older.h5"),
        input_shape=(32, 32, 3),
    )
    for ours, theirs in zip(again.get_weights(), base.get_weights(), strict=True):
        assert np.array_equal(ours, theirs)


def test_first_fifth_validates(handful, weights, tmp_path):
    """With one label in the first fifth and another in the rest, a head learns to miss it."""
    with np.load(handful) as file:
        data = dict(file)
    data["y_train"][:] = 1
    data["y_train"][: len(data["y_train"]) // 5] = 8
    np.savez(tmp_path / "data.npz", **data)
    arguments = ["--data", "data.npz", "--weights", weights, "--learning-rate", "1e-3"]
    call(TRANSFER, *arguments, cwd=tmp_path)
    last = read_history(tmp_path)[-1]
    assert last["accuracy"] > 0.95
    assert last["val_accuracy"] < 0.05


@pytest.mark.pictures
def test_one_epoch_makes_a_plot(tmp_path):
    history = {name: [0.5] for name in ("accuracy", "loss", "val_accuracy", "val_loss")}
    transfer_vgg16.plot_history(history, tmp_path)
    assert len(read_history(tmp_path)) == 1
    assert np.asarray(Image.open(tmp_path / "loss.png").convert("L")).std() > 1


@pytest.mark.pictures
def test_model_is_not_drawn_without_graphviz(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("keras.src.utils.model_visualization.pydot", None)
    transfer_vgg16.draw_model(make_model(), tmp_path / "model.png")
    path = re.escape(str(tmp_path / "model.png"))
    assert re.fullmatch(rf"{path} was not drawn: .*pydot.*\n", capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["model_blocks.png"]


@pytest.mark.slow
def test_run_goes_on_without_graphviz(few, weights, tmp_path):
    (tmp_path / "pydot.py").write_text("raise ImportError('no pydot here')")
    arguments = ["--data", few, "--weights", weights, "--epochs", 1]
    stdout, stderr = run(TRANSFER, *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert stderr == ""
    assert re.search("^transfer_learning_vgg16_cifar10.png was not drawn: .+$", stdout, re.M)
    assert not (tmp_path / "transfer_learning_vgg16_cifar10.png").exists()
    assert "正解: [" in stdout


def check_console_without_japanese(stdout, stderr):
    assert stderr == ""
    words = r"\?\?: \?+ \(\w+\), \?\?: \?+ \(\w+\)"
    assert re.search(rf"^\?\?: \d, \?\?: \[\d\]\n{words}$", stdout, re.M)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_console_without_japanese(encoding, finished, subset):
    printed = call(PREDICT, "--data", subset, cwd=finished[0], encoding=encoding)
    check_console_without_japanese(*printed)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_process_on_a_console_without_japanese(encoding, finished, subset):
    settings = {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    check_console_without_japanese(*run(PREDICT, "--data", subset, cwd=finished[0], **settings))


@pytest.mark.slow
def test_the_whole_job(cifar10, weights, tmp_path):
    if hashlib.sha256(cifar10["x_train"]).hexdigest() != JPEG_COPY_SHA256:
        pytest.skip("cifar10.npz is not the JPEG copy for which the figures were measured")
    data = save_part(tmp_path / "cifar10.npz", cifar10, 50000, 10000)
    stdout, stderr = run(TRANSFER, "--data", data, "--weights", weights, cwd=tmp_path)
    assert stderr == ""
    np.testing.assert_allclose(read_figures(tmp_path), FULL_HISTORY, rtol=0, atol=0.01)
    assert read_result(stdout) == pytest.approx(FULL_RESULT, abs=0.015)

    stdout, _ = run(PREDICT, "--data", data, cwd=tmp_path)
    assert read_result(stdout) == pytest.approx(FULL_RESULT, abs=0.015)
