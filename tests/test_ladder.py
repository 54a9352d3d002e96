"""The way up from the article: each flag does what it says, and every model can be used."""

import collections
import re
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from benchmark import LADDER, count_operations
from conftest import (
    PREDICT,
    TRANSFER,
    call,
    check_error,
    read_figures,
    read_history,
    read_result,
    run_program,
)
from PIL import Image

import predict_saved
import transfer_vgg16

FLAGS = ["--preprocess", "--optimizer", "adam", "--epochs", 2, "--fine-tune-epochs", 2]


# ----- what VGG16 is given


@pytest.mark.parametrize("size", [48, pytest.param(32, marks=pytest.mark.slow)])
def test_vgg16_gets_preprocessed_and_enlarged_images(size, few, weights, tmp_path):
    """The stored features are those of plain Keras, given what its VGG16 was trained on."""
    arguments = ["--data", few, "--weights", weights, "--epochs", 1]
    call(TRANSFER, *arguments, "--preprocess", "--image-size", size, cwd=tmp_path)
    with np.load(few) as file:
        images = tf.image.resize(file["x_test"].astype("float32"), (size, size)).numpy()
    base = keras.applications.VGG16(
        include_top=False, weights=str(weights), input_shape=(size, size, 3)
    )
    expected = base.predict(keras.applications.vgg16.preprocess_input(images), verbose=0)
    (path,) = [
        path for path in tmp_path.glob("*.features") if path.stat().st_size == expected.nbytes + 32
    ]
    test = np.fromfile(path, "float32", expected.size).reshape(expected.shape)
    np.testing.assert_allclose(test, expected, rtol=1e-3, atol=1e-2)

    model = keras.models.load_model(tmp_path / "vgg16_cifar10.keras")
    assert model.input_shape == (None, 32, 32, 3)
    names = [layer.name for layer in model.layers if layer.name.startswith("block")]
    assert names == [layer.name for layer in base.layers[1:]]


# ----- optimizers


OPTIMIZERS = [
    ([], "SGD", 1e-4),
    (["--optimizer", "adam"], "Adam", 1e-3),
    (["--optimizer", "RMSprop", "--learning-rate", "2e-4"], "RMSprop", 2e-4),
    (["--optimizer", "adamw"], "AdamW", 1e-3),
    (["--optimizer", "muon"], "Muon", 1e-3),
]


def check_optimizer(optimizer, name, rate):
    assert type(optimizer).__name__ == name
    assert float(optimizer.learning_rate) == pytest.approx(rate)
    if name == "SGD":
        assert optimizer.momentum == 0.9


@pytest.mark.parametrize(
    ("flags", "name", "rate"),
    [
        OPTIMIZERS[0],
        OPTIMIZERS[4],
        *(pytest.param(*values, marks=pytest.mark.slow) for values in OPTIMIZERS[1:4]),
    ],
)
def test_optimizer_of_a_run(flags, name, rate, few, weights, tmp_path):
    arguments = ["--data", few, "--weights", weights, "--epochs", 1, "--batch-size", 7]
    _, stderr = call(TRANSFER, *arguments, *flags, cwd=tmp_path)
    assert stderr == ""
    optimizer = keras.models.load_model(tmp_path / "vgg16_cifar10.keras").optimizer
    check_optimizer(optimizer, name, rate)
    assert int(optimizer.iterations) == 5


# ----- thawed blocks


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [2, 5])
def test_stored_features_give_the_numbers_of_the_whole_network(blocks, few, weights, tmp_path):
    """Only the thawed blocks change, and they change as when VGG16 runs in every epoch."""
    histories, results, models = [], [], []
    for flags in ([], ["--end-to-end"]):
        arguments = ["--data", few, "--weights", weights, "--unfreeze", blocks, *flags]
        stdout, stderr = call(TRANSFER, *arguments, *FLAGS, cwd=tmp_path)
        assert stderr == ""
        histories.append(read_figures(tmp_path))
        results.append(read_result(stdout))
        models.append(keras.models.load_model(tmp_path / "vgg16_cifar10.keras"))
    assert len(histories[0]) == 4
    np.testing.assert_allclose(*histories, rtol=0, atol=1e-3)
    assert results[0] == pytest.approx(results[1], abs=1e-3)

    base = keras.applications.VGG16(
        include_top=False, weights=str(weights), input_shape=(32, 32, 3)
    )
    for layer, original in zip(models[0].layers[1:19], base.layers[1:], strict=True):
        if original.weights:
            same = np.array_equal(layer.kernel, original.kernel)
            assert same == (int(layer.name[5]) <= 5 - blocks), layer.name
            moved = np.linalg.norm(layer.kernel - original.kernel)
            theirs = models[1].get_layer(layer.name).kernel
            assert np.linalg.norm(layer.kernel - theirs) <= 0.1 * moved, layer.name
    for ours, theirs in zip(models[0].weights, models[1].weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "optimizer",
    ["sgd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rmsprop", "muon"))],
)
def test_one_step_of_fine_tuning(optimizer, few, weights, tmp_path):
    """The very first step already has a learning rate: it changes the thawed block."""
    arguments = ["--data", few, "--weights", weights, "--unfreeze", 1, "--batch-size", 32]
    arguments += ["--optimizer", optimizer, "--epochs", 1, "--fine-tune-epochs", 1]
    stdout, stderr = call(TRANSFER, *arguments, cwd=tmp_path)
    assert stderr == ""
    assert np.isfinite(read_result(stdout)).all()
    first, second = read_history(tmp_path)
    assert second["val_loss"] != first["val_loss"]


def check_schedule(schedule, peak):
    """Check the rates of ten steps: there are so few that the first is the peak."""
    rates = [float(schedule(step)) for step in range(11)]
    assert rates[0] == max(rates) == pytest.approx(peak)
    assert sorted(rates, reverse=True) == rates
    assert rates[10] == pytest.approx(0, abs=1e-12)


def test_rate_warms_up_and_decays():
    check_schedule(transfer_vgg16.warm_up_and_decay(3e-5, 10), 3e-5)
    schedule = transfer_vgg16.warm_up_and_decay(1.0, 100)
    rates = [float(schedule(step)) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == max(rates) == pytest.approx(1)
    assert sorted(rates[:11]) == rates[:11]
    assert sorted(rates[10:], reverse=True) == rates[10:]


@pytest.mark.slow
def test_fine_tuning_warms_up_and_decays(few, weights, tmp_path):
    arguments = ["--data", few, "--weights", weights, "--unfreeze", 1, "--batch-size", 7]
    call(TRANSFER, *arguments, *FLAGS, "--fine-tune-learning-rate", "3e-5", cwd=tmp_path)
    model = keras.models.load_model(tmp_path / "vgg16_cifar10.keras")
    config = model.optimizer.get_config()["learning_rate"]
    check_schedule(keras.optimizers.schedules.deserialize(config), 3e-5)


@pytest.mark.pictures
def test_plots_mark_where_fine_tuning_starts(tmp_path):
    names = ("accuracy", "loss", "val_accuracy", "val_loss")
    history = {name: [0.4, 0.3, 0.2, 0.1] for name in names}
    transfer_vgg16.plot_history(history, tmp_path, fine_tuning_from=2)
    plt = transfer_vgg16.plt
    for number, name in enumerate(("loss.png", "accuracy.png")):
        axis = plt.figure(plt.get_fignums()[number - 2]).axes[0]
        middle, _ = axis.transData.transform((2.5, 0))  # between epochs 2 and 3
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)
        gray = np.all(pixels == 128, axis=-1).sum(axis=0)  # by column
        assert abs(gray.argmax() - middle) < 4
        assert gray.max() > 150
    plt.close("all")


@pytest.mark.slow
def test_float16_fine_tuning_scales_its_loss(few, weights, tmp_path):
    arguments = ["--data", few, "--weights", weights, "--unfreeze", 1, *FLAGS]
    stdout, stderr = call(TRANSFER, *arguments, "--precision", "mixed_float16", cwd=tmp_path)
    assert stderr == ""
    model = keras.models.load_model(tmp_path / "vgg16_cifar10.keras")
    assert type(model.optimizer).__name__ == "LossScaleOptimizer"
    assert np.isfinite(read_result(stdout)).all()


def test_features_that_do_not_fit(few, weights, tmp_path, monkeypatch):
    """32 images of 112x112x64 numbers are 0.10 GB: no pass begins where the disk has less."""
    disk = collections.namedtuple("disk", "total used free")(2e9, 1.91e9, 0.09e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    arguments = ["--data", few, "--weights", weights, "--image-size", 224, "--unfreeze", 4]
    stdout, stderr = call(TRANSFER, *arguments, "--output-dir", "out", cwd=tmp_path, status=2)
    assert "run over" not in stdout
    check_error(
        stderr,
        r"the outputs of block1_pool need 0\.1 GB on the disk, and only 0\.1 are free in "
        + rf"{tmp_path / 'out'}: delete files there .+",
    )
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".png"}


# ----- mirror images


@pytest.mark.slow
def test_mirror_gives_the_numbers_of_the_whole_network(few, weights, tmp_path, monkeypatch):
    """The outputs for the mirror images are stored as well, and there is more to learn from."""
    arguments = ["--data", few, "--weights", weights, *FLAGS, "--unfreeze", 1]
    histories = []
    for name, flags in (("fast", ["--mirror"]), ("slow", ["--mirror"]), ("without", [])):
        (tmp_path / name).mkdir()
        with monkeypatch.context() as patch:
            if name == "slow":  # only the input carries everything: all runs in every epoch
                patch.setattr(transfer_vgg16, "find_front", lambda model: (model.inputs, "x"))
            stdout, _ = call(TRANSFER, *arguments, *flags, cwd=tmp_path / name)
        assert ("run over" in stdout) == (name != "slow")
        histories.append(read_figures(tmp_path / name))
    np.testing.assert_allclose(*histories[:2], rtol=0, atol=1e-3)
    assert np.abs(histories[0] - histories[2]).max() > 0.01


def test_test_images_are_averaged_with_their_mirror_images(finished, few, weights, tmp_path):
    """Both scripts print the plain figures first, then those of plain Keras's mean of the two."""
    arguments = ["--data", few, "--weights", weights, "--epochs", 1, "--preprocess"]
    stdout, _ = call(TRANSFER, *arguments, "--mirror", "--optimizer", "adam", cwd=tmp_path)
    again, _ = call(PREDICT, "--data", few, cwd=tmp_path)
    model = keras.models.load_model(tmp_path / "vgg16_cifar10.keras")
    with np.load(few) as file:
        x, y = file["x_test"], file["y_test"][:, 0]
    Image.fromarray(x[0]).save(tmp_path / "first.png")
    plain = model.predict(x, verbose=0)
    mean = (plain + model.predict(x[:, :, ::-1], verbose=0)) / 2
    accuracy = (mean.argmax(axis=1) == y).mean()
    assert np.abs(plain - mean).max() > 0.05
    for text in (stdout, again):
        assert read_result(text) == pytest.approx(model.evaluate(x, y, verbose=0), abs=1e-3)
        found = re.search(r"\naveraged with the mirror images: accuracy (.+)\n", text)
        assert float(found[1]) == pytest.approx(accuracy, abs=1e-4)
        assert f"予測: {mean[0].argmax()}, 正解: [{y[0]}]" in text
    answer, _ = call(PREDICT, "first.png", cwd=tmp_path)
    notes = predict_saved.read_notes(tmp_path / "vgg16_cifar10.keras")
    sure = transfer_vgg16.temper(mean, notes["temperature"])[0].max()
    assert float(re.search(r" ([\d.]+)%, ", answer)[1]) == pytest.approx(100 * sure, abs=0.11)

    assert "averaged" not in call(PREDICT, "--data", few, cwd=finished[0])[0]


def test_one_line_names_the_settings(finished, capsys):
    """Those that were given, and those that were not."""
    arguments = ["--optimizer", "adam", "--epochs", "1", "--seed", "3"]
    transfer_vgg16.print_settings(transfer_vgg16.parse_arguments(arguments))
    line = "settings: image-size 32, preprocess False, mirror False, optimizer adam, epochs 1, "
    line += "learning-rate 0.001, batch-size 32, precision float32, seed 3\n"
    assert capsys.readouterr().out == line
    line = "settings: image-size 32, preprocess False, mirror False, optimizer sgd, epochs 3, "
    line += "learning-rate 0.0001, batch-size 32, precision float32, seed 0\n"
    assert f"\n{line}" in finished[1]


# ----- the models of the rungs


RUNGS = [
    {flag: value for rung in LADDER[: i + 1] for flag, value in rung.items()}
    for i in range(len(LADDER))
]
MOST_FLAGS = RUNGS[-1] | {"--image-size": "32"}
slow = [RUNGS[-1], {"--unfreeze": "5"}]
RUNGS = [MOST_FLAGS, *(pytest.param(rung, marks=pytest.mark.slow) for rung in slow)]


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: " ".join(rung) or "article")
def test_companion_repeats_the_figures_of_a_rung(rung, few, weights, tmp_path):
    """Given the validation images as test images, it prints the best epoch's figures."""
    with np.load(few) as file:
        data = dict(file)
    data["x_test"], data["y_test"] = data["x_train"][:8], data["y_train"][:8]
    np.savez(tmp_path / "data.npz", **data)
    flags = [word for item in rung.items() for word in item if word]
    arguments = ["--data", "data.npz", "--weights", weights, *flags, "--epochs", 2]
    if "--unfreeze" in rung:
        arguments += ["--fine-tune-epochs", 1]
    stdout, stderr = call(TRANSFER, *arguments, cwd=tmp_path)
    assert stderr == ""
    best = min(read_history(tmp_path), key=lambda row: row["val_loss"])
    stdout, stderr = call(PREDICT, "--data", "data.npz", cwd=tmp_path)
    assert stderr == ""
    loss, accuracy = read_result(stdout)
    assert loss == pytest.approx(best["val_loss"], rel=1e-3)
    assert accuracy == pytest.approx(best["val_accuracy"], abs=1e-4)


# ----- several devices


@pytest.mark.slow
def test_two_devices_give_the_numbers_of_one(few, weights, tmp_path):
    """Two logical CPU devices share each batch, as several GPUs would.

    Without dropout: each device draws a mask of its own, so no numbers could be compared. The
    companion, in the same process, is not shared.
    """
    program = """
        import sys
        import predict_saved
        import transfer_vgg16

        keras, tf = transfer_vgg16.keras, transfer_vgg16.tf
        cpu = tf.config.list_physical_devices("CPU")[0]
        halves = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, halves)
        keras.layers.Dropout = lambda rate: keras.layers.Activation("linear")
        status = transfer_vgg16.main(sys.argv[1:])
        strategy = tf.distribute.get_strategy()
        print("devices that shared each batch:", strategy.num_replicas_in_sync)
        predict_saved.main(["photo.png"])
        sys.exit(status)
    """
    arguments = ["--data", few, "--weights", weights, *FLAGS, "--unfreeze", 1]
    histories, results = [], []
    for devices, more in ((1, []), (2, ["--distribute"])):
        directory = tmp_path / str(devices)
        directory.mkdir()
        Image.new("RGB", (40, 40), "blue").save(directory / "photo.png")
        stdout, stderr = run_program(program, *arguments, *more, cwd=directory)
        assert stderr == ""
        alone, _ = call(PREDICT, "photo.png", cwd=directory)
        assert stdout.endswith(f"devices that shared each batch: {devices}\n{alone}")
        histories.append(read_figures(directory))
        results.append(read_result(stdout))
    np.testing.assert_allclose(*histories, rtol=0, atol=1e-3)
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-3)
    assert results[0][1] == pytest.approx(results[1][1], abs=0.051)  # one image of 20


def test_one_device_cannot_be_distributed(few, weights, tmp_path):
    arguments = ["--data", few, "--weights", weights, "--distribute"]
    _, stderr = call(TRANSFER, *arguments, cwd=tmp_path, status=2)
    check_error(stderr, "--distribute needs two GPUs or more, .+: leave it out")


# ----- the benchmark's count


@pytest.mark.parametrize(
    ("flags", "images", "block5_passes"),
    [
        ({}, 60, 0),
        ({"--unfreeze": "1", "--fine-tune-epochs": "2"}, 60, 290),
        ({"--unfreeze": "1", "--fine-tune-epochs": "2", "--mirror": ""}, 120, 310),
    ],
)
def test_operations(flags, images, block5_passes):
    """VGG16 once over 60,000 images at 32x32, 0.626 GFLOP each; the head is next to nothing.

    Two epochs of fine-tuning pass 40,000 images forth and back and 10,000 forth, twice over; at
    the end, 10,000 are evaluated and predicted, and 10,000 others predicted. --mirror adds the
    mirror images of all, and of these 20,000.
    """
    block5 = 3 * 2 * (3 * 3 * 512) * 512 * 2 * 2  # three convolutions, 2x2 pixels
    expected = images * 1000 * 0.626e9 + block5_passes * 1000 * block5
    assert count_operations(flags, 40000, 10000, 10000) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image-size", "31"], "argument --image-size: '31' is not a whole number from 32 to"),
        (["--image-size", "225"], "argument --image-size: '225' is not a whole number from 32 to"),
        (["--unfreeze", "6"], "argument --unfreeze: '6' is not a whole number from 0 to 5"),
        (["--optimizer", "addam"], "argument --optimizer: invalid choice: 'addam' .+muon"),
        (["--optimizer", ""], "argument --optimizer: invalid choice: ''"),
        (["--fine-tune-epochs", "2"], "--fine-tune-.+ has no effect without --unfreeze"),
        (
            ["--fine-tune-learning-rate", "1"],
            "--fine-tune-.+ has no effect without --unfreeze",
        ),
    ],
)
def test_bad_argument(arguments, sentence, tmp_path):
    stdout, stderr = call(TRANSFER, *arguments, cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, rf"{sentence}.*")
    assert list(tmp_path.iterdir()) == []


def test_diverging_fine_tuning(few, weights, tmp_path):
    arguments = ["--data", few, "--weights", weights, "--unfreeze", 1, *FLAGS]
    arguments += ["--fine-tune-learning-rate", "1e30"]
    _, stderr = call(TRANSFER, *arguments, cwd=tmp_path, status=2)
    check_error(stderr, r"the loss became infinite or NaN in epoch \d: lower --fine-tune-.+-rate")
    assert re.match("3,", (tmp_path / "history.csv").read_text().splitlines()[3])
