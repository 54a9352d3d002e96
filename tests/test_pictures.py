"""One's own pictures: files of all kinds are answered, and folders of photos can be trained on.

test_folders.py shows which directory is what; here, both scripts are started as a user does.
"""

import re
import shutil

import keras
import numpy as np
import pytest
from conftest import PREDICT, TRANSFER, call, check_error, read_result, save_model
from PIL import Image

import predict_saved
import transfer_vgg16

transfer_vgg16.import_libraries()
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
        r"Always saying (automobile|馬) would give 0\.\d\d; recognised worst is .+", balance
    )
    assert re.fullmatch("予測: (automobile|馬), 正解: (automobile|馬)", words)
    assert keras.models.load_model(directory / "vgg16_cifar10.keras").output_shape == (None, 2)


def evaluate(directory, photos, part):
    """Return what Keras says of the model in `directory` and a part of `photos`, or all."""
    files, _ = transfer_vgg16.find_photos(photos)
    chosen = files[part] if part else [file for of_part in files.values() for file in of_part]
    images, labels, _ = transfer_vgg16.read_photos(chosen, 128)
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
    check_error(stderr, r"photos needs a directory for each class, two or more, and has 1 \(car\)")
    save_photos(tmp_path / "photos", images, 2, horse=7)
    _, stderr = call(TRANSFER, *arguments, cwd=tmp_path, status=2)
    check_error(stderr, "too few readable photos: horse has 0 for train: add some .+")
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
    check_error(stderr, "there is no picture to name: give the paths of some")


def test_pattern_that_no_shell_expands(files, trained):
    stdout, stderr = call(PREDICT, files / "*.gif", cwd=trained[0])
    assert stderr == ""
    assert [file.rsplit("/", 1)[1][:2] for file in answers(stdout)] == ["15", "16"]


def test_photo_model_is_not_evaluated_on_other_classes(trained, handful, images, tmp_path):
    for arguments in ([], ["--data", handful]):
        _, stderr = call(PREDICT, *arguments, cwd=trained[0], status=2)
        check_error(stderr, r"the model knows automobile, 馬, not CIFAR-10's classes: give it .+")
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


@pytest.mark.pictures
def test_confusion_matrix_and_predictions_say_what_was_predicted(tmp_path):
    transfer_vgg16.import_libraries()
    plt = transfer_vgg16.plt
    names = ["cat", "$_$", "frog"]
    labels = np.array([0, 0, 0, 0, 1, 1])[:, None]
    probabilities = np.eye(3)[[0, 0, 1, 2, 1, 1]]
    path = tmp_path / "matrix.png"
    transfer_vgg16.plot_confusion_matrix(probabilities, labels, names, path, "title")
    axis = plt.gca()
    texts = [text.get_text() for text in axis.texts]
    assert texts[:9] == ["2", "1", "1", "0", "2", "0", "0", "0", "0"]
    assert texts[9:] == ["50%", "100%", "-", "recall"]
    assert [text.get_text() for text in axis.get_xticklabels()] == names
    assert [text.get_text() for text in axis.get_yticklabels()] == names
    assert axis.get_ylabel() == "True class"
    assert axis.get_title() == "title"
    assert np.asarray(Image.open(path).convert("L")).std() > 10

    images = np.zeros((6, 32, 32, 3), np.uint8)
    path = tmp_path / "grid.png"
    transfer_vgg16.plot_predictions(images, probabilities, names, path, labels, "title")
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
    plt.close("all")


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
