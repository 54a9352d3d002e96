"""main() is there to be edited: after a change of a line or two, all that follows still works."""

import importlib
import re
import sys

import numpy as np
import pytest
from conftest import PREDICT, TRANSFER, WRITTEN, call, draw_blank, read_figures, write_data
from PIL import Image

import predict_saved
import transfer_vgg16

INPUT = "    x = inputs\n"
BASE = "VGG16(include_top=False, weights=weights, input_tensor=x)"
LOSS = 'loss="sparse_categorical_crossentropy"'
METRICS = f'{LOSS}, metrics=["accuracy"]'
DENSE = 'x = layers.Dense(256, activation="relu")(x)'
FLIP = "x = layers.RandomRotation(0.1)(layers.RandomFlip()(x))"
TOP3 = 'keras.metrics.SparseTopKCategoricalAccuracy(3, name="top3")'


def base(name):
    return {BASE: f"keras.applications.{name}(include_top=False, weights=None, input_tensor=x)"}


EDITS = {
    "a thawed block": {
        "for layer in vgg16.layers:\n": "for layer in vgg16.layers[:-4]:\n",
    },
    "all thawed": {"        layer.trainable = False": "        layer.trainable = True"},
    "random images": {INPUT: f"{INPUT}    {FLIP}\n"},
    "a loss object": {LOSS: "loss=keras.losses.SparseCategoricalCrossentropy()"},
    "more metrics": {METRICS: f'{LOSS}, metrics=["accuracy", {TOP3}]'},
    "other metrics": {METRICS: f"{LOSS}, metrics=[{TOP3}]"},
    "EarlyStopping": {
        "keras.callbacks.TerminateOnNaN()]": 'keras.callbacks.EarlyStopping("loss", baseline=0)]'
    },
    "ResNet50V2": base("ResNet50V2"),
    "MobileNetV2": base("MobileNetV2"),
    "EfficientNetV2B0": base("EfficientNetV2B0"),
    "GlobalAveragePooling2D": {"layers.Flatten()": "layers.GlobalAveragePooling2D()"},
    "BatchNormalization": {DENSE: f"{DENSE}\n    x = layers.BatchNormalization()(x)"},
    "512 units": {DENSE: DENSE.replace("256", "512")},
    "two Dense layers": {DENSE: f"{DENSE}\n    {DENSE}"},
    "another size": {
        "if args.image_size != train_imgs.shape[1]:": "if True:",
        "layers.Resizing(args.image_size, args.image_size)": "layers.Resizing(64, 64)",
    },
}
FAST = {"a thawed block", "random images"}
CASES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in EDITS]


def edit(changes, directory):
    """Write a copy of the script with the `changes`; return its path, which can be imported."""
    text = TRANSFER.read_text(encoding="utf-8")
    for before, after in changes.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path = directory / f"edited_{len(sys.modules)}.py"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def script(request, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    return edit(EDITS[request.param], tmp_path)


@pytest.mark.pictures
@pytest.mark.parametrize("script", CASES, indirect=True)
def test_edited_main(script, weights, tmp_path):
    """The numbers are those of the plain code; the companion, the figures and the maps work."""
    data = write_data(tmp_path / "data.npz")
    arguments = ["--data", data, "--weights", weights, "--epochs", 2]
    for directory in ("plain", "fast"):
        (tmp_path / directory).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        draw_blank(patch)
        _, stderr = call(script, *arguments, "--end-to-end", cwd=tmp_path / "plain")
        assert stderr == ""
    stdout, stderr = call(script, *arguments, cwd=tmp_path / "fast")
    assert stderr == ""
    np.testing.assert_allclose(
        *(read_figures(tmp_path / directory) for directory in ("plain", "fast")), atol=1e-3
    )
    place = tmp_path / "fast"
    drawn = {name for name in WRITTEN if name.endswith(".png")} - {"accuracy.png", "mistakes.png"}
    assert {path.name for path in place.iterdir()} > {*drawn, "history.csv", "vgg16_cifar10.keras"}

    printed, stderr = call(PREDICT, "--data", data, cwd=place)
    assert stderr == ""
    saved = re.findall(r"^\[.+\]$", stdout, re.M)[-1]
    numbers = [float(number) for number in saved.strip("[]").split(", ")]
    model, notes = predict_saved.load_model(place / "vgg16_cifar10.keras")
    again = re.search(r"^\[.+\]$", printed, re.M)[0]
    found = [float(number) for number in again.strip("[]").split(", ")]
    assert found == pytest.approx(numbers, rel=1e-3, abs=1e-3)

    with np.load(data) as file:
        images = file["x_test"]
    Image.fromarray(images[0]).save(place / "picture.png")
    printed, stderr = call(PREDICT, "--figure", "answer.png", "picture.png", cwd=place)
    assert stderr == ""
    assert re.match(r"picture\.png: .+ [\d.]+%, .+ [\d.]+%, .+ [\d.]+%\n", printed)
    assert np.asarray(Image.open(place / "answer.png").convert("L")).std() > 5
    maps = transfer_vgg16.explain(model, images[:3], np.array([0, 1, 2]), notes["mirror"])
    assert maps.shape == (3, 32, 32)
    assert np.isfinite(maps).all()


def test_fine_tuning_begins_where_the_head_ended(weights, tmp_path, monkeypatch):
    """With a learner's EarlyStopping, that is before --epochs: Keras stops after the second."""
    monkeypatch.syspath_prepend(tmp_path)
    script = edit(EDITS["EarlyStopping"], tmp_path)
    module, drawn = importlib.import_module(script.stem), []
    monkeypatch.setattr(module, "plot_history", lambda *arguments: drawn.append(arguments))
    arguments = ["--data", write_data(tmp_path / "data.npz"), "--weights", weights, "--epochs", 5]
    call(script, *arguments, "--unfreeze", 1, "--fine-tune-epochs", 1, cwd=tmp_path)
    ((history, _, head_epochs),) = drawn
    assert (len(history["loss"]), head_epochs) == (3, 2)
