"""How sure a model says that it is, and where it looked: held against what its answers do."""

import re

import keras
import numpy as np
import pytest
from conftest import PREDICT, TRANSFER, call, make_model, read_history
from PIL import Image

import predict_saved
import transfer_vgg16

ERRORS = r"Confidence is off by (\S+) on average on the test images \(.+\), "
ERRORS += r"and by (\S+) after calibration, with the temperature (\S+)\n"


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def calibration_error(probabilities, labels):
    """Return the expected calibration error by its definition, bin after bin."""
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    error = 0
    for i in range(15):
        inside = (sure * 15 >= i) & ((sure * 15 < i + 1) | (i == 14))
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    return error


# ----- how sure


@pytest.fixture(scope="module")
def overconfident():
    """Probabilities of 20,000 images as from logits three times too large, and the labels."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (20000, 5))
    labels = [random.choice(5, p=row) for row in softmax(logits)]
    return softmax(3 * logits).astype("float32"), np.array(labels)[:, None]


def test_temperature_undoes_overconfidence(overconfident):
    probabilities, labels = overconfident
    temperature = transfer_vgg16.fit_temperature(probabilities[:10000], labels[:10000])
    assert temperature == pytest.approx(3, rel=0.05)
    tempered = transfer_vgg16.temper(probabilities, temperature)
    assert np.array_equal(tempered.argmax(axis=1), probabilities.argmax(axis=1))
    np.testing.assert_allclose(tempered.sum(axis=1), 1)
    before, after = (
        transfer_vgg16.calibration_error(part[10000:], labels[10000:])
        for part in (probabilities, tempered)
    )
    assert before == pytest.approx(calibration_error(probabilities[10000:], labels[10000:, 0]))
    assert before > 0.15
    assert after < 0.02
    np.testing.assert_allclose(transfer_vgg16.temper(probabilities, 1), probabilities, atol=1e-6)


@pytest.mark.parametrize("count", [1, 6, 50])
def test_few_photos_that_are_all_right_ask_for_no_certainty(count):
    """Six right answers may as well come from a model that is right seven times out of eight."""
    probabilities = softmax(np.full((count, 3), 1e-3) + [[30, 0, 0]])
    temperature = transfer_vgg16.fit_temperature(probabilities, np.zeros((count, 1), int))
    sure = transfer_vgg16.temper(probabilities, temperature).max(axis=1)
    assert sure == pytest.approx((count + 1) / (count + 2), abs=0.01)


def test_probabilities_of_zero_and_one_stay_numbers():
    tempered = transfer_vgg16.temper(np.eye(3, dtype="float32"), 20)
    assert np.isfinite(tempered).all()
    assert (tempered.argmax(axis=1) == [0, 1, 2]).all()
    assert tempered.max() < 1


SPOILED = ["--unfreeze", "1", "--fine-tune-epochs", "1", "--fine-tune-learning-rate", "1e-2"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--mirror", *SPOILED],
        pytest.param(["--learning-rate", "3e-3"], marks=pytest.mark.slow),
        pytest.param(SPOILED, marks=pytest.mark.slow),
    ],
)
def test_saved_model_has_its_own_temperature(flags, handful, weights, tmp_path):
    """It is not that of the last epoch, which was worse; the companion's percentages use it."""
    arguments = ["--data", handful, "--weights", weights, "--preprocess", "--epochs", 8]
    stdout, stderr = call(TRANSFER, *arguments, "--optimizer", "adam", *flags, cwd=tmp_path)
    assert stderr == ""
    losses = [row["val_loss"] for row in read_history(tmp_path)]
    assert min(losses) < losses[-1]  # or this tests nothing

    model = keras.models.load_model(tmp_path / "vgg16_cifar10.keras")
    with np.load(handful) as file:
        x, y = file["x_test"], file["y_test"][:, 0]
        x_val, y_val = file["x_train"][:40], file["y_train"][:40, 0]
    steps = (1, -1) if "--mirror" in flags else (1,)  # the mirror images' mean with the images
    validation, probabilities = (
        np.mean([model.predict(images[:, :, ::step], verbose=0) for step in steps], axis=0)
        for images in (x_val, x)
    )
    share = (np.sum(validation.argmax(axis=1) == y_val) + 1) / 42
    before, after, temperature = map(float, re.search(ERRORS, stdout).groups())
    exact = predict_saved.read_notes(tmp_path / "vgg16_cifar10.keras")["temperature"]
    assert temperature == pytest.approx(exact, abs=0.006)
    sure = softmax(np.log(np.maximum(validation, 1e-38)) / exact).max(axis=1).mean()
    assert sure == pytest.approx(share, abs=0.01)
    tempered = softmax(np.log(np.maximum(probabilities, 1e-38)) / exact)
    assert before == pytest.approx(calibration_error(probabilities, y), abs=2e-3)
    assert after == pytest.approx(calibration_error(tempered, y), abs=2e-3)

    Image.fromarray(x[0]).save(tmp_path / "first.png")
    answer, _ = call(PREDICT, "first.png", cwd=tmp_path)
    percent = float(re.search(r" ([\d.]+)%, ", answer)[1])
    assert percent == pytest.approx(100 * tempered[0].max(), abs=0.11)


@pytest.mark.parametrize(("monitor", "best"), [("val_loss", 4), ("val_accuracy", 3)])
def test_epoch_that_is_saved(monitor, best, tmp_path):
    """The lowest val_loss, or the highest val_accuracy and among equals the lowest val_loss."""
    model = make_model()
    save_best = transfer_vgg16.SaveBest(tmp_path / "best.keras", monitor)
    save_best.set_model(model)
    for epoch, (accuracy, loss) in enumerate(
        [(0.5, 1.0), (0.75, 2.0), (0.75, 1.5), (0.5, 0.1), (0.75, 1.6), (0.9, np.nan)]
    ):
        model.layers[-1].bias.assign(np.full(10, epoch + 1))
        save_best.on_epoch_end(epoch, {"val_accuracy": accuracy, "val_loss": loss})
    assert save_best.epoch == best
    saved = keras.models.load_model(tmp_path / "best.keras")
    assert (saved.layers[-1].bias.numpy() == best).all()
    save_best.restore()
    assert (model.layers[-1].bias.numpy() == best).all()


def test_temperature_that_cannot_be_saved_ends_no_run(tmp_path, capsys):
    """The model is there, whole: a line tells that its percentages stay as they are."""
    path = tmp_path / "vgg16_cifar10.keras"
    path.write_text("of the best epoch")
    part = transfer_vgg16.partial_path(path)
    part.mkdir()  # in its way
    (part / "file").touch()
    transfer_vgg16.save_model(make_model(), {"temperature": 2.0}, path)
    assert re.fullmatch(rf"{path} could not be written \(.+\): .+\n", capsys.readouterr().out)
    assert path.read_text() == "of the best epoch"


@pytest.mark.slow
def test_another_run_in_the_same_directory(few, weights, tmp_path, monkeypatch):
    """Its model is not taken for this one's best, nor given this one's temperature."""
    arguments = ["--data", few, "--weights", weights, "--mirror", "--epochs", 2]
    arguments += ["--optimizer", "adam", "--preprocess", *SPOILED]
    (tmp_path / "alone").mkdir()
    alone, _ = call(TRANSFER, *arguments, cwd=tmp_path / "alone")
    losses = [row["val_loss"] for row in read_history(tmp_path / "alone")]
    assert min(losses) < losses[-1]  # or this tests nothing
    path, print_averaged = tmp_path / "vgg16_cifar10.keras", transfer_vgg16.print_averaged

    def meanwhile(*args):
        path.write_text("the other run's")
        print_averaged(*args)

    monkeypatch.setattr(transfer_vgg16, "print_averaged", meanwhile)
    stdout, _ = call(TRANSFER, *arguments, cwd=tmp_path)
    assert re.search(ERRORS, stdout)[0] == re.search(ERRORS, alone)[0]
    notes = [predict_saved.read_notes(one / path.name) for one in (tmp_path, tmp_path / "alone")]
    assert notes[0] == notes[1]
    models = [keras.models.load_model(one / path.name) for one in (tmp_path, tmp_path / "alone")]
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, other)


# ----- where it looked


def draw_discs():
    """Return images and labels, in Keras's layout: discs; the class is the colour."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, (2500, 1))
    colours = 255 * np.array(transfer_vgg16.plt.colormaps["tab10"].colors)[labels[:, 0]]
    x, y = random.uniform(8, 24, (2, 2500, 1, 1))
    radius = random.uniform(4, 12, (2500, 1, 1))
    rows, columns = np.mgrid[:32, :32]
    discs = np.hypot(columns - x, rows - y) < radius
    images = np.where(discs[..., None], colours[:, None, None], 230)
    images = random.normal(images, 10).clip(0, 255).astype("uint8")
    return (images[:2000], labels[:2000]), (images[2000:], labels[2000:])


def check_maps(model, notes, images):
    """Check that the discs in `images` speak for their classes.

    So covering what a map names first costs more than covering as much of what it names last.
    """
    count, size = images.shape[:2]
    probabilities, rows = predict_saved.classify(model, notes, images), np.arange(count)
    classes = probabilities.argmax(axis=1)
    maps = transfer_vgg16.explain(model, images, classes, notes["mirror"])
    assert maps.shape == (count, size, size)
    assert maps.min() >= 0
    np.testing.assert_allclose(maps.max(axis=(1, 2)), 1, rtol=1e-5)

    disc = np.abs(images.astype(int) - 230).max(axis=-1) > 60
    inside, outside = (
        (maps * part).sum(axis=(1, 2)) / part.sum(axis=(1, 2)) for part in (disc, ~disc)
    )
    assert (inside > outside).mean() >= 0.7  # maps of noise: 0.5
    left = []
    for order in (np.argsort(-maps.reshape(count, -1)), np.argsort(maps.reshape(count, -1))):
        covered = images.reshape(count, -1, 3).copy()
        for image, pixels in zip(covered, order[:, : size * size // 4], strict=True):
            image[pixels] = image.mean(axis=0)
        covered = predict_saved.classify(model, notes, covered.reshape(images.shape))
        left.append(covered[rows, classes])
    assert left[0].mean() < left[1].mean() - 0.1
    return left


@pytest.mark.slow
def test_maps_name_what_an_answer_rests_on(weights, shared):
    (x, y), (images, labels) = draw_discs()

    def train(place):
        np.savez(place / "d.npz", x_train=x[:500], y_train=y[:500], x_test=images, y_test=labels)
        return call(TRANSFER, "--data", "d.npz", "--weights", weights, cwd=place)[0]

    directory, _ = shared("discs", train)
    model, notes = predict_saved.load_model(directory / "vgg16_cifar10.keras")
    check_maps(model, notes, images[:100])


@pytest.mark.slow
def test_maps_of_photos_name_what_an_answer_rests_on(tmp_path):
    """The photos are discs on a ground; the class is the colour of the disc."""
    (x, y), (x_test, y_test) = draw_discs()
    for label in range(4):
        (tmp_path / "discs" / str(label)).mkdir(parents=True)
        for i in np.flatnonzero(y[:, 0] == label)[:40]:
            Image.fromarray(x[i]).save(tmp_path / "discs" / str(label) / f"{i}.png")
    call(TRANSFER, "--data", "discs", "--epochs", 5, cwd=tmp_path)
    model, notes = predict_saved.load_model(tmp_path / "vgg16_cifar10.keras")
    images = x_test[y_test[:, 0] < 4][:100].repeat(4, axis=1).repeat(4, axis=2)
    left = check_maps(model, notes, images)
    assert (left[0] < left[1]).sum() >= 70  # maps of noise: 50


def test_many_large_pictures_are_answered_a_few_at_a_time(monkeypatch):
    """As many as fit in memory: 5 of 224 pixels."""
    inputs = keras.Input((224, 224, 3))
    x = keras.layers.Conv2D(64, 3, 8, "same")(keras.layers.Conv2D(64, 1)(inputs))
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(x))
    images = np.random.default_rng(0).integers(0, 256, (12, 224, 224, 3)).astype("uint8")
    expected = model.predict_on_batch(images)
    counts, step = [], keras.Model.predict_on_batch
    monkeypatch.setattr(
        keras.Model, "predict_on_batch", lambda *a: (counts.append(len(a[1])), step(*a))[1]
    )
    found = predict_saved.classify(model, {"mirror": False, "temperature": 1}, images)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert counts == [5, 5, 2]


def test_maps_with_mirror_images_are_of_both(finished, subset):
    """The map of a mirror image is the mirror image of the map, as the answers are the same."""
    model, _ = predict_saved.load_model(finished[0] / "vgg16_cifar10.keras")
    with np.load(subset) as file:
        images = file["x_test"][:5]
    mirrored, classes = images[:, :, ::-1], np.arange(5)
    explain = transfer_vgg16.explain
    maps = explain(model, images, classes, True)
    np.testing.assert_allclose(
        maps[:, :, ::-1], explain(model, mirrored, classes, True), atol=1e-3
    )
    one_sided = explain(model, images, classes, False)
    assert np.abs(one_sided[:, :, ::-1] - explain(model, mirrored, classes, False)).max() > 0.1


@pytest.mark.parametrize(
    "size", [32, 48, *(pytest.param(size, marks=pytest.mark.slow) for size in (128, 224))]
)
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_maps_of_every_size_and_precision(size, precision):
    """Also those of models that the article's own code saved: float32, here with their weights."""
    keras.config.set_dtype_policy(precision)
    try:
        model = make_model(size)
    finally:
        keras.config.set_dtype_policy("float32")
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), "uint8")
    maps = transfer_vgg16.explain(model, images, np.array([0, 1, 2]), False)
    assert maps.shape == (3, size, size)
    assert np.isfinite(maps).all()
    assert (maps.std(axis=(1, 2)) > 0).all()


BASES = ["VGG16", "ResNet50V2", "MobileNetV2", "EfficientNetV2B0"]


@pytest.mark.parametrize(
    ("size", "precision"),
    [
        (32, "float32"),
        (64, "mixed_bfloat16"),
        pytest.param(128, "float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("base", BASES)
def test_maps_of_other_bases_and_heads(base, size, precision):
    """The two parts that a map is made of are together the model, and its numbers spread."""
    layers = keras.layers
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(precision)
    try:
        inputs = keras.Input((size, size, 3))
        x = layers.RandomFlip()(inputs)
        x = getattr(keras.applications, base)(
            include_top=False, weights=None, input_tensor=x
        ).output
        x = layers.BatchNormalization()(layers.GlobalAveragePooling2D()(x))
        x = layers.Dropout(0.5)(layers.Dense(64, activation="relu")(x))
        x = layers.Dense(32, activation="relu")(x)
        model = keras.Model(inputs, layers.Dense(4, activation="softmax")(x))
    finally:
        keras.config.set_dtype_policy("float32")
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), "uint8")
    to_grid, from_grid = transfer_vgg16.split_at_grid(model)
    assert min(to_grid.output.shape[1:3]) >= 8
    features = from_grid(to_grid(images, training=False), training=False)
    logits = np.array(features, "float32") @ model.layers[-1].kernel + model.layers[-1].bias
    probabilities = model.predict(images, verbose=0).astype("float32")
    tolerance = 1e-5 if precision == "float32" else 0.02
    np.testing.assert_allclose(softmax(np.array(logits)), probabilities, atol=tolerance)
    maps = transfer_vgg16.explain(model, images, np.array([0, 1, 2]))
    assert maps.shape == (3, size, size)
    assert np.isfinite(maps).all()
    assert (maps.std(axis=(1, 2)) > 0).all()


def test_maps_of_a_grid_smaller_than_eight():
    """There is none of eight by eight: the largest one is taken, which is the first here."""
    inputs = keras.Input((20, 20, 3))
    x = keras.layers.Conv2D(4, 3, strides=4, name="five")(inputs)
    x = keras.layers.Conv2D(4, 3, name="three")(x)
    outputs = keras.layers.Dense(2, activation="softmax")(keras.layers.Flatten()(x))
    to_grid, _ = transfer_vgg16.split_at_grid(keras.Model(inputs, outputs))
    assert to_grid.layers[-1].name == "five"


def test_maps_are_of_the_class_that_is_asked_for(finished, subset):
    model, _ = predict_saved.load_model(finished[0] / "vgg16_cifar10.keras")
    with np.load(subset) as file:
        images = file["x_test"][:5]
    one, two = (transfer_vgg16.explain(model, images, np.full(5, i), False) for i in (0, 1))
    assert np.abs(one - two).max() > 0.1


def test_colours_lie_where_the_map_is():
    images = np.full((1, 4, 4, 3), 100, "uint8")
    maps = np.zeros((1, 4, 4))
    maps[0, 0, 0] = 1
    looks = transfer_vgg16.overlay(images, maps)[0]
    assert looks.dtype == np.uint8
    assert (looks.reshape(-1, 3)[1:] == 100).all()
    red, green, blue = map(int, looks[0, 0])
    assert red > 1.5 * max(green, blue)


def test_mistakes_are_the_surest_wrong_answers(finished, subset, tmp_path, monkeypatch):
    """Surest first, six at most, each with its true class."""
    model, notes = predict_saved.load_model(finished[0] / "vgg16_cifar10.keras")
    with np.load(subset) as file:
        x, y = file["x_test"], file["y_test"]
    probabilities = model.predict(x, verbose=0)
    drawn = {}
    monkeypatch.setattr(transfer_vgg16, "plot_pairs", lambda *args: drawn.update(enumerate(args)))
    names, path = notes["class_names"], tmp_path / "mistakes.png"
    transfer_vgg16.plot_mistakes(model, x, probabilities, names, path, y)
    wrong = [i for i in range(len(x)) if probabilities[i].argmax() != y[i, 0]]
    wrong = sorted(wrong, key=lambda i: -probabilities[i].max())[:6]
    np.testing.assert_array_equal(drawn[1], x[wrong])
    np.testing.assert_array_equal(drawn[2], probabilities[wrong])
    shown = transfer_vgg16.drawable_names(names)
    assert drawn[5] == [f"true: {shown[y[i, 0]]}" for i in wrong]


@pytest.mark.pictures
def test_pairs_show_the_picture_where_it_looked_and_three_bars(finished, subset, tmp_path):
    model, _ = predict_saved.load_model(finished[0] / "vgg16_cifar10.keras")
    with np.load(subset) as file:
        images = file["x_test"][:4]
    probabilities = np.full((4, 10), 0.01)
    probabilities[:, [7, 2, 5]] = 0.6, 0.23, 0.1
    names = [f"name {i}" for i in range(10)]
    captions = ["a.png", "$b$.png", "c" * 80, ""]
    path = str(tmp_path / "pairs.png")
    transfer_vgg16.plot_pairs(model, images, probabilities, names, path, captions)
    figure = transfer_vgg16.plt.gcf()
    looks = transfer_vgg16.highlight(model, images, np.full(4, 7))
    for i, cell in enumerate(figure.subfigs[:4]):
        image, look, bars = cell.axes
        np.testing.assert_array_equal(image.get_images()[0].get_array(), images[i])
        np.testing.assert_array_equal(look.get_images()[0].get_array(), looks[i])
        assert [bar.get_width() for bar in bars.patches] == [0.6, 0.23, 0.1]
        texts = [text.get_text() for text in bars.texts]
        assert texts == ["name 7", "60%", "name 2", "23%", "name 5", "10%"]
    assert [cell.get_suptitle() for cell in figure.subfigs[:2]] == captions[:2]
    assert len(figure.subfigs[2].get_suptitle()) <= 34
    assert np.asarray(Image.open(path).convert("L")).std() > 10
    transfer_vgg16.plt.close("all")


def test_map_that_fails_is_a_line(tmp_path, capsys):
    """A model of another kind, which has no grid: the run goes on."""
    inputs = keras.Input((32, 32, 3))
    outputs = keras.layers.Dense(2, activation="softmax")(keras.layers.Flatten()(inputs))
    images, path = np.zeros((1, 32, 32, 3), "uint8"), tmp_path / "mistakes.png"
    model = keras.Model(inputs, outputs)
    transfer_vgg16.plot_mistakes(model, images, np.eye(2)[:1], ["a", "b"], path, [1])
    assert capsys.readouterr().out == (
        f"{path} was not drawn: the model has no layer whose output is a grid\n"
    )
    notes = {"class_names": ["a", "b"], "mirror": False, "temperature": 1}
    Image.fromarray(images[0]).save(tmp_path / "picture.png")
    pictures, figure = [tmp_path / "picture.png"], tmp_path / "answer.png"
    with pytest.raises(transfer_vgg16.Failure, match=r"could not be drawn \(.+\): leave out --f"):
        predict_saved.name_pictures(model, notes, pictures, figure)


def test_no_mistakes_no_figure(finished, subset, tmp_path, capsys):
    model, notes = predict_saved.load_model(finished[0] / "vgg16_cifar10.keras")
    (tmp_path / "mistakes.png").write_text("of a former run")
    x, y = np.zeros((3, 32, 32, 3), "uint8"), np.arange(3)[:, None]
    names = notes["class_names"]
    path = tmp_path / "mistakes.png"
    transfer_vgg16.plot_mistakes(model, x, np.eye(10)[:3], names, path, y)
    assert not path.exists()
    assert capsys.readouterr().out == ""  # the article's last line stays the last one
