"""One's own pictures: files of all kinds are answered, and folders of photos can be trained on.

test_folders.py shows which directory is what; here, both scripts are started as a user does.
"""

import re
import shutil

import keras
import numpy as np
import pytest
from conftest import (
    PREDICT,
    TRANSFER,
    call,
    check_error,
    read_result,
    run_program,
    save_model,
)
from PIL import Image

import predict_saved
import transfer_vgg16

ORIENTATION = 0x0112  # the EXIF tag; 6: the camera was turned, turn the picture by 270 degrees


def save_photos(directory, images, count, start=0, **classes):
    """Save `count` training images of each class, from `start` on, into its directory, as PNG."""
    for name, label in classes.items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        for i in np.flatnonzero(images["y_train"][:, 0] == label)[start : start + count]:
            Image.fromarray(images["x_train"][i]).save(directory / name / f"{i}.png")
    return directory


@pytest.fixture(scope="module")
def photos(images, tmp_path_factory):
    directory = tmp_path_factory.mktemp("photos")
    return save_photos(directory / "写真 1", images, 24, automobile=1, 馬=7)


@pytest.fixture(scope="module")
def trained(photos, shared):
    """Where a run with default settings on the photos wrote its files, and what it printed."""

    def make(directory):
        stdout, stderr = call(TRANSFER, "--data", photos, cwd=directory)
        assert stderr == ""
        return stdout

    return shared("trained", make)


def answers(stdout):
    """Return {file: [(class, per cent), ...]} as predict_saved.py printed it."""
    return {
        file: [
            (name, float(share)) for name, share in re.findall(r"(?:^|, )(.+?) ([\d.]+)%", rest)
        ]
        for file, rest in re.findall(r"^(.+?): (.+%)$", stdout, re.M)
    }


# ----- training on photos


def test_two_classes_with_default_settings(trained):
    directory, stdout = trained
    assert "image-size 128, preprocess True, mirror True, optimizer adam, epochs 20" in stdout
    assert "48 pictures in 2 classes" in stdout
    assert read_result(stdout)[1] > 0.75
    assert {path.name for path in directory.iterdir()} >= {
        "predictions.png",
        "vgg16_cifar10.keras",
    }
    *_, balance, _, words = stdout.splitlines()
    assert re.fullmatch(
        r"Always guessing (automobile|馬) would score 0\.\d\d\. Hardest class: .+", balance
    )
    assert re.fullmatch("予測: (automobile|馬), 正解: (automobile|馬)", words)
    assert keras.models.load_model(directory / "vgg16_cifar10.keras").output_shape == (None, 2)


def evaluate(directory, photos, part):
    """Return what Keras says of the model in `directory` and a part of `photos`, or all."""
    files, _ = transfer_vgg16.find_photos(photos)
    chosen = files[part] if part else [file for of_part in files.values() for file in of_part]
    images, _, _ = transfer_vgg16.read_photos([path for path, _ in chosen], 128)
    labels = np.array([[label] for _, label in chosen])
    model = keras.models.load_model(directory / "vgg16_cifar10.keras")
    return model.evaluate(images, labels, verbose=0)


@pytest.mark.parametrize("flags, part", [([], "test"), (["--all"], None)])
def test_companion_evaluates_on_photos(flags, part, trained, images, tmp_path):
    directory, _ = trained
    photos = save_photos(tmp_path / "photos", images, 8, start=24, automobile=1, 馬=7)
    printed, stderr = call(PREDICT, "--data", photos, *flags, cwd=directory)
    assert stderr == ""
    assert read_result(printed) == pytest.approx(evaluate(directory, photos, part), rel=1e-4)


def test_a_folder_that_has_grown_is_tested_on_what_no_training_saw(
    trained, photos, images, tmp_path
):
    files, _ = transfer_vgg16.find_photos(photos)
    grown = shutil.copytree(photos, tmp_path / "grown")
    save_photos(grown, images, 12, start=24, automobile=1, 馬=7)
    tested = {path.name for path, _ in transfer_vgg16.find_photos(grown)[0]["test"]}
    assert len(tested) > len(files["test"])
    assert not tested & {path.name for path, _ in files["train"] + files["validation"]}
    stdout, stderr = call(PREDICT, "--data", grown, cwd=trained[0])
    assert stderr == ""
    assert read_result(stdout)[1] > 0.75


def test_accuracy_decides_which_epoch_of_photos_is_saved(photos, few, tmp_path, monkeypatch):
    """On other images, it is val_loss, as in the article; no run goes on from there."""
    monkeypatch.setattr(
        transfer_vgg16, "SaveBest", lambda path, monitor, **notes: transfer_vgg16.fail(monitor)
    )
    for data, monitor in ((photos, "val_accuracy"), (few, "val_loss")):
        arguments = ["--data", data, "--image-size", 32]
        _, stderr = call(TRANSFER, *arguments, cwd=tmp_path, status=2)
        check_error(stderr.splitlines()[-1], monitor)


def test_train_and_test_directories(images, tmp_path):
    save_photos(tmp_path / "photos" / "train", images, 20, car=1, horse=7)
    save_photos(tmp_path / "photos" / "test", images, 5, start=20, horse=7, car=1)
    arguments = ["--data", "photos", "--epochs", 1, "--image-size", 48, "--no-mirror"]
    stdout, stderr = call(TRANSFER, *arguments, cwd=tmp_path)
    assert stderr == ""
    model = keras.models.load_model(tmp_path / "vgg16_cifar10.keras")
    assert model.input_shape == (None, 48, 48, 3)
    printed, stderr = call(PREDICT, "--data", "photos", cwd=tmp_path)
    assert stderr == ""
    assert read_result(printed) == pytest.approx(read_result(stdout), rel=1e-3)


def test_bad_directory(images, tmp_path):
    save_photos(tmp_path / "photos", images, 20, car=1)
    arguments = ["--data", "photos", "--output-dir", "out"]
    _, stderr = call(TRANSFER, *arguments, cwd=tmp_path, status=2)
    check_error(
        stderr, r"photos needs a directory for each class, two or more, .+, and has 1 \(car\): .+"
    )
    save_photos(tmp_path / "photos", images, 2, horse=7)
    _, stderr = call(TRANSFER, *arguments, cwd=tmp_path, status=2)
    check_error(stderr, r"photos needs .+ has 1 \(car\): .+")
    assert list((tmp_path / "out").iterdir()) == []


# ----- asking about pictures


def test_companion_gives_the_model_s_probabilities(trained, images, tmp_path):
    directory, _ = trained
    for i, image in enumerate(images["x_test"][:10]):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    pictures = [transfer_vgg16.read_photo(path, 128) for path in sorted(tmp_path.iterdir())]
    stdout, stderr = call(PREDICT, tmp_path, cwd=directory)
    assert stderr == ""
    model = keras.models.load_model(directory / "vgg16_cifar10.keras")
    notes = predict_saved.read_notes(directory / "vgg16_cifar10.keras")
    assert notes["mirror"]
    mirrored = np.array(pictures)[:, :, ::-1]
    expected = model.predict(np.array(pictures), verbose=0) + model.predict(mirrored, verbose=0)
    expected = transfer_vgg16.temper(expected / 2, notes["temperature"]) * 100
    printed = answers(stdout)
    assert list(printed) == [str(tmp_path / f"{i:02}.png") for i in range(10)]
    for found, shares in zip(printed.values(), expected, strict=True):
        assert [share for _, share in found] == sorted((s for _, s in found), reverse=True)
        assert dict(found) == pytest.approx(
            dict(zip(("automobile", "馬"), shares, strict=True)), abs=0.06
        )


@pytest.fixture(scope="module")
def files(images, tmp_path_factory):
    """Twenty files that show the same horse, and what they have in common is the picture alone."""
    directory = tmp_path_factory.mktemp("絵 files")
    horses = images["x_train"][images["y_train"][:, 0] == 7]
    horse = Image.fromarray(horses[100])  # of those that no model here was trained on
    large = horse.resize((320, 320), Image.Resampling.NEAREST)
    wide = Image.new("RGB", (500, 320), "white")
    wide.paste(large, (90, 0))
    tall = Image.new("RGB", (320, 401), "black")
    tall.paste(large, (0, 40))
    huge = horse.resize((4000, 4000), Image.Resampling.NEAREST)
    alpha = large.convert("RGBA")
    cornered = large.convert("RGBA")
    cornered.putpixel((0, 0), (0, 0, 0, 0))
    palette = large.quantize(256)
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    gray = large.convert("L")
    deep = Image.fromarray(np.asarray(gray).astype("uint16") * 257)

    save = {
        "01 plain.png": (horse, {}),
        "02 large.png": (large, {}),
        "03 wide.png": (wide, {}),
        "04 tall.bmp": (tall, {}),
        "05 huge.jpg": (huge, {"quality": 95}),
        "06 upright.jpg": (large, {"quality": 95}),
        "07 turned.jpg": (
            large.transpose(Image.Transpose.ROTATE_90),
            {"quality": 95, "exif": turned},
        ),
        "08 cmyk.jpg": (large.convert("CMYK"), {"quality": 95}),
        "09 cmyk.tif": (large.convert("CMYK"), {}),
        "10 lossless.webp": (large, {"lossless": True}),
        "11 lossy.webp": (large, {"quality": 95}),
        "12 alpha.png": (alpha, {}),
        "13 alpha.webp": (cornered, {"lossless": True}),
        "14 palette.png": (palette, {}),
        "15 palette.gif": (palette, {}),
        "16 moving.gif": (palette, {"save_all": True, "append_images": [gray.convert("P")]}),
        "17 gray.png": (gray, {}),
        "18 gray alpha.png": (gray.convert("LA"), {}),
        "19 gray 16 bits.png": (deep, {}),
        "20 gray.jpg": (gray, {"quality": 95}),
    }
    for name, (image, settings) in save.items():
        image.save(directory / name, **settings)
    return directory


def test_twenty_kinds_of_files(files, trained):
    directory, _ = trained
    stdout, stderr = call(PREDICT, *sorted(files.iterdir()), cwd=directory)
    assert stderr == ""
    printed = {file.rsplit("/", 1)[1][:2]: found for file, found in answers(stdout).items()}
    assert len(printed) == 20
    assert {name for name, _ in printed["01"]} == {"automobile", "馬"}
    pixels = [transfer_vgg16.read_photo(file, 128).astype(int) for file in sorted(files.iterdir())]
    assert np.corrcoef(pixels[0].flat, pixels[1].flat)[0, 1] > 0.9  # as they are scaled
    for number in (3, 4, 5, 6, 9, 10, 11, 12, 13):  # as the second, but for scaling and loss
        assert np.abs(pixels[number - 1] - pixels[1]).mean() < 9, number
    for found in printed.values():
        assert found[0][0] == "馬"
    assert dict(printed["06"]) == pytest.approx(dict(printed["07"]), abs=3)  # lossy files
    assert printed["15"] == printed["16"]
    assert dict(printed["17"]) == pytest.approx(dict(printed["19"]), abs=1)
    assert printed["17"] == printed["18"]


def test_turned_picture_is_not_upright_without_its_exif(files, tmp_path):
    """What the tag does is seen: the same picture without it is another one."""
    Image.open(files / "07 turned.jpg").save(tmp_path / "lying.png", exif=b"")
    upright, turned, lying = (
        transfer_vgg16.read_photo(path, 128).astype(int)
        for path in (files / "06 upright.jpg", files / "07 turned.jpg", tmp_path / "lying.png")
    )
    assert abs(turned - upright).mean() < 3
    assert abs(lying - upright).mean() > 10


def test_broken_file_among_good_ones(files, trained, tmp_path):
    directory, _ = trained
    turned = (files / "07 turned.jpg").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(turned[: len(turned) // 2])
    (tmp_path / "text.png").write_text("no picture")
    good = [files / "01 plain.png", files / "02 large.png"]
    arguments = [good[0], tmp_path / "broken.jpg", tmp_path / "text.png", "no such.jpg", good[1]]
    stdout, stderr = call(PREDICT, *arguments, cwd=directory, status=2)
    assert list(answers(stdout)) == [str(file) for file in good]
    lines = stderr.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ("broken.jpg", "text.png", "no such.jpg"), strict=True):
        assert re.fullmatch(rf".*{name} is left out: .+", line)


@pytest.mark.pictures
def test_figure(files, trained, tmp_path):
    directory, _ = trained
    pictures = sorted(files.iterdir())[:6]  # in two rows
    stdout, stderr = call(PREDICT, "--figure", tmp_path / "out.png", *pictures, cwd=directory)
    assert stderr == ""
    assert len(answers(stdout)) == 6
    assert np.asarray(Image.open(tmp_path / "out.png").convert("L")).std() > 10
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["vgg16_cifar10.keras"], "a .keras file is a model: give it with --model"),
        (["--figure", "a.png"], "--figure draws pictures: name some"),
        (["a.png", "--figure", "a.jpg", "b.png"], "argument --figure: a.jpg does not end in .png"),
        (["--data", "x.npz", "a.png"], "--data is what to evaluate on: leave it out"),
    ],
)
def test_bad_argument(arguments, sentence, tmp_path):
    stdout, stderr = call(PREDICT, *arguments, cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, rf"{sentence}.*")


def test_directory_without_pictures(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "weights.h5").write_text("no picture")
    stdout, stderr = call(PREDICT, tmp_path, cwd=trained[0], status=2)
    assert stdout == f"{tmp_path}: 0 pictures, 2 other files\n"
    check_error(stderr, "no pictures were found: give the paths of some")


def test_pattern_that_no_shell_expands(files, trained):
    stdout, stderr = call(PREDICT, files / "*.gif", cwd=trained[0])
    assert stderr == ""
    assert [file.rsplit("/", 1)[1][:2] for file in answers(stdout)] == ["15", "16"]


def test_photo_model_is_not_evaluated_on_other_classes(trained, handful, images, tmp_path):
    for arguments in ([], ["--data", handful]):
        _, stderr = call(PREDICT, *arguments, cwd=trained[0], status=2)
        check_error(stderr, r"the model knows automobile, 馬, and not the classes of .+")
    with np.load(handful) as file:
        arrays = dict(file) | {"class_names": np.array(["automobile", "馬"])}
    for name in ("y_train", "y_test"):
        arrays[name] = arrays[name] % 2
    np.savez(tmp_path / "small.npz", **arrays)
    _, stderr = call(PREDICT, "--data", tmp_path / "small.npz", cwd=trained[0], status=2)
    check_error(
        stderr, r"the model takes images of \d+ pixels, and .+small.npz has smaller ones.*"
    )
    other = save_photos(tmp_path / "other", images, 20, cat=3, dog=5)
    _, stderr = call(PREDICT, "--data", other, cwd=trained[0], status=2)
    check_error(stderr, "the model knows automobile, 馬, but .+other has cat, dog.*")


def test_model_of_the_article_s_own_code(files, tmp_path):
    """It has no names of its own: they are CIFAR-10's."""
    save_model(tmp_path / "vgg16_cifar10.keras")
    stdout, stderr = call(PREDICT, files / "01 plain.png", cwd=tmp_path)
    assert stderr == ""
    assert "names no classes: they are taken to be CIFAR-10's" in stdout
    ((_, found),) = answers(stdout).items()
    assert len(found) == 3
    assert all(re.fullmatch(r"\S+ \([a-z]+\)", name) for name, _ in found)


# ----- the pictures that the training draws


@pytest.fixture
def plt():
    yield transfer_vgg16.plt
    transfer_vgg16.plt.close("all")


@pytest.mark.pictures
def test_confusion_matrix_and_predictions_say_what_was_predicted(plt, tmp_path):
    names = ["cat", "$_$", "frog"]
    labels = np.array([0, 0, 0, 0, 1, 1])[:, None]
    probabilities = np.eye(3)[[0, 0, 1, 2, 1, 1]]
    path = tmp_path / "matrix.png"
    transfer_vgg16.plot_confusion_matrix(probabilities, labels, names, path)
    axis = plt.gca()
    assert [text.get_text() for text in axis.texts[:4]] == ["recall", "50%", "100%", "-"]
    assert [text.get_text() for text in axis.texts[4:]] == [*"211", "", "2", *[""] * 4]
    shares = axis.get_images()[0].get_array()
    np.testing.assert_array_equal(shares, [[0.5, 0.25, 0.25], [0, 1, 0], [0, 0, 0]])
    assert [text.get_text() for text in axis.get_xticklabels()] == names
    assert [text.get_text() for text in axis.get_yticklabels()] == names
    assert axis.get_ylabel() == "True class"
    assert plt.gcf().get_suptitle() == "Which class was taken for which"
    assert np.asarray(Image.open(path).convert("L")).std() > 10

    images = np.zeros((6, 32, 32, 3), np.uint8)
    path = tmp_path / "grid.png"
    transfer_vgg16.plot_predictions(images, probabilities, names, path, labels)
    titles = [axis.title for axis in plt.gcf().axes if axis.get_title()]
    assert [title.get_text() for title in titles] == [
        "✓ cat",
        "✓ cat",
        "✗ $_$\ntrue: cat",
        "✗ frog\ntrue: cat",
        "✓ $_$",
        "✓ $_$",
    ]
    colors = [title.get_color() for title in titles]
    assert colors == ["black", "black", "red", "red", "black", "black"]
    assert np.asarray(Image.open(path).convert("L")).std() > 10


@pytest.mark.pictures
@pytest.mark.parametrize("count", [2, 40, 300])
def test_labels_of_a_confusion_matrix_do_not_overlap(count, plt, tmp_path):
    """From 60 classes on there are no names, and the picture does not grow."""
    path = tmp_path / "matrix.png"
    names = [f"class {i}" for i in range(count)]
    transfer_vgg16.plot_confusion_matrix(np.eye(count), np.arange(count), names, path)
    assert max(Image.open(path).size) <= 2000
    renderer, axis = plt.gcf().canvas.get_renderer(), plt.gca()
    boxes = [text.get_window_extent(renderer) for text in axis.get_yticklabels()]
    assert len(boxes) == count or (count > 60 and len(boxes) < 20)
    tops = sorted((box.y0, box.y1) for box in boxes)
    assert all(one[1] <= other[0] for one, other in zip(tops, tops[1:], strict=False))


@pytest.mark.pictures
def test_history_with_any_metrics(plt, tmp_path):
    """No accuracy, no figure of it; a metric of some epochs only has no place in a row."""
    (tmp_path / "accuracy.png").write_text("of a former run")
    history = {"loss": [2.0, 1.0], "auc, micro": [0.5, 0.75], "val_loss": [3.0, 2.5], "late": [1]}
    transfer_vgg16.plot_history(history, str(tmp_path))
    assert (tmp_path / "history.csv").read_bytes() == (
        b'epoch,"auc, micro",loss,val_loss\n1,0.5,2.0,3.0\n2,0.75,1.0,2.5\n'
    )
    assert {path.name for path in tmp_path.iterdir()} == {"history.csv", "loss.png"}
    assert [list(line.get_ydata()) for line in plt.gca().lines] == [[2.0, 1.0], [3.0, 2.5]]
    transfer_vgg16.plot_history({"loss": [1.5], "accuracy": [0.5]}, tmp_path)
    assert plt.gcf().get_suptitle() == "Accuracy after each epoch"


@pytest.mark.pictures
def test_first_epoch_does_not_squash_the_others(plt, tmp_path):
    """Its values stand at the edge, and the axis fits the rest; where they fit, all is seen."""
    history = {"loss": [90, 3.0, 2.0, 1.0], "val_loss": [40, 3.5, 3.0, 2.5]}
    history |= {"accuracy": [0.5, 0.6, 0.7, 0.8], "val_accuracy": [0.1, 0.6, 0.65, 0.7]}
    transfer_vgg16.plot_history(history, tmp_path, fine_tuning_from=2)
    loss, accuracy = (plt.figure(number).axes[0] for number in plt.get_fignums())
    assert [text.get_text() for text in loss.texts] == ["↑ 90", "↑ 40"]
    low, high = loss.get_ylim()
    assert 0.5 < low < 1
    assert 3.5 < high < 4
    assert [text.get_text() for text in accuracy.texts] == ["↓ 0.1"]
    assert list(loss.lines[2].get_xdata()) == [2.5, 2.5]
    gentle = {"loss": [3.0, 2.0, 1.5, 1.0]}
    transfer_vgg16.plot_history(gentle, tmp_path)
    assert list(plt.gca().texts) == []
    assert plt.gca().get_ylim()[1] > 3


def draw_some(directory):
    """Draw figures of each kind that needs no model."""
    names, labels = ["cat", "dog"], np.array([[0], [1]])
    images = np.zeros((2, 32, 32, 3), np.uint8)
    transfer_vgg16.plot_history({"loss": [2.0, 1.0]}, directory)
    path = directory / "matrix.png"
    transfer_vgg16.plot_confusion_matrix(np.eye(2), labels, names, path)
    path = directory / "predictions.png"
    transfer_vgg16.plot_predictions(images, np.eye(2), names, path, labels)
    return {path.name: path.read_bytes() for path in directory.glob("*.png")}


@pytest.mark.pictures
def test_figures_do_not_depend_on_the_user_s_settings(plt, tmp_path):
    expected = draw_some(tmp_path)
    settings = {
        "text.usetex": True,
        "font.size": 50,
        "font.family": "no such font",
        "savefig.dpi": 30,
        "figure.facecolor": "black",
        "image.interpolation": "bicubic",
    }
    with plt.rc_context(settings):
        assert draw_some(tmp_path) == expected
        assert {name: plt.rcParams[name] for name in settings} == settings | {
            "font.family": ["no such font"]
        }


@pytest.mark.slow
def test_backend_that_needs_a_screen(tmp_path):
    """A matplotlibrc asks for windows, and there is no screen: the figures are drawn."""
    (tmp_path / "matplotlibrc").write_text("backend: TkAgg\n")
    program = """
        from pathlib import Path

        import transfer_vgg16

        transfer_vgg16.plot_history({"loss": [2.0, 1.0]}, Path())
        transfer_vgg16.show_figures()
    """
    stdout, stderr = run_program(program, cwd=tmp_path, MATPLOTLIBRC=str(tmp_path))
    assert (stdout, stderr) == ("", "")
    assert Image.open(tmp_path / "loss.png").size == (900, 600)


@pytest.mark.pictures
def test_figure_that_fails_is_a_line(plt, tmp_path, capsys):
    """Whatever the error: here, labels beyond the classes."""
    names, path = ["cat"], tmp_path / "predictions.png"
    images = np.zeros((1, 32, 32, 3), np.uint8)
    transfer_vgg16.plot_predictions(images, np.eye(1), names, path, [3])
    assert capsys.readouterr().out == f"{path} was not drawn: list index out of range\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat", "𓀀"], ["cat", "class 1"]),
        (["class 1", "𓀀", "𓀁"], ["class 1", "class 1*", "class 2"]),
        (["𓀀", "class 0", "𓀀 (a)"], ["class 0*", "class 0", "a"]),
        (["a" * 30 + "x", "a" * 30 + "y"], ["a" * 23 + "…", "class 1"]),
        (["(a)", "$a_b$"], ["(a)", "$a_b$"]),
    ],
)
def test_names_in_figures_differ_and_can_be_drawn(names, expected):
    assert transfer_vgg16.drawable_names(names) == expected
    assert transfer_vgg16.drawable_names(expected) == expected


def test_fonts_that_were_installed_later(monkeypatch):
    """matplotlib's list is older than a font: it is found once a name needs it."""
    manager = transfer_vgg16.font_manager.fontManager
    files = {font.fname for font in manager.ttflist if font.name in transfer_vgg16.CJK_FONTS}
    if not files:
        pytest.skip("no Japanese font is installed")
    older = [font for font in manager.ttflist if font.fname not in files]
    monkeypatch.setattr(manager, "ttflist", older)
    assert transfer_vgg16.figure_fonts() == ["DejaVu Sans"]
    assert transfer_vgg16.drawable_names(["cat"]) == ["cat"]
    assert transfer_vgg16.figure_fonts() == ["DejaVu Sans"]
    assert transfer_vgg16.drawable_names(["猫 (cat)"]) == ["猫 (cat)"]
    assert len(transfer_vgg16.figure_fonts()) > 1


@pytest.mark.pictures
def test_blocks_of_a_model_are_drawn_from_it(plt, tmp_path):
    """Layers of the same grid are one block; the head's stand alone; the colour is `trainable`."""
    inputs = keras.Input((64, 64, 3))
    base = keras.applications.VGG16(include_top=False, weights=None, input_tensor=inputs)
    base.trainable = False
    base.get_layer("block5_conv3").trainable = True
    x = keras.layers.GlobalAveragePooling2D()(base.output)
    x = keras.layers.Dense(7, activation="softmax")(keras.layers.BatchNormalization()(x))
    transfer_vgg16.draw_blocks(keras.Model(inputs, x), tmp_path / "blocks.png")
    axis = plt.gca()
    texts = [text.get_text().split("\n")[:2] for text in axis.texts if text.get_text()]
    assert texts == [
        ["image", "64×64"],
        ["2 × Conv2D", "64×64×64"],
        ["2 × Conv2D", "32×32×128"],
        ["3 × Conv2D", "16×16×256"],
        ["3 × Conv2D", "8×8×512"],
        ["3 × Conv2D", "4×4×512"],
        ["BatchNormalization", "512"],
        ["Dense", "7"],
    ]
    colors = [bar.get_facecolor() for bar in axis.patches]
    assert colors[1] == colors[4] != colors[5] == colors[7]
    width, height = Image.open(tmp_path / "blocks.png").size
    assert width > 2 * height


@pytest.mark.parametrize("base", ["ResNet50V2", "MobileNetV2", "EfficientNetV2B0", "DenseNet121"])
def test_blocks_of_other_models(base):
    """Each grid is one block, whatever 1 x 1 layers a network has in between."""
    model = getattr(keras.applications, base)(
        include_top=False, weights=None, input_shape=(64, 64, 3)
    )
    blocks = transfer_vgg16.find_blocks(model)
    assert 5 <= len(blocks) <= 6
    counted = sum(layer.count_params() for block in blocks for layer in block)
    assert counted == model.count_params()


@pytest.mark.slow
@pytest.mark.pictures
def test_many_classes_and_names_that_no_font_has(images, weights, tmp_path):
    """Twelve classes, one named in a script that few fonts have: no warning, no lost name."""
    names = [f"class{i:02}" for i in range(11)] + ["𓀀𓁐"]
    photos = tmp_path / "photos"
    for i, name in enumerate(names):
        save_photos(photos, images, 12, **{name: i % 10})
    arguments = ["--data", photos, "--weights", weights, "--epochs", 1]
    arguments += ["--image-size", 48, "--no-mirror"]
    _, stderr = call(TRANSFER, *arguments, cwd=tmp_path)
    assert stderr == ""
    shutil.rmtree(photos)
    stdout, _ = call(PREDICT, "confusion_matrix.png", cwd=tmp_path)
    assert len(answers(stdout)["confusion_matrix.png"]) == 3
