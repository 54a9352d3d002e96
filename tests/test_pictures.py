"""One's own pictures: files of all kinds are answered, and folders of photos can be trained on."""

import re
import shutil
import textwrap

import keras
import numpy as np
import pytest
from conftest import PREDICT, ROOT, TRANSFER, read_result, run
from PIL import Image
from test_first_run import check_error, save_model, save_weights

ORIENTATION = 0x0112  # the EXIF tag; 6: the camera was turned, turn the picture by 270 degrees


def save_photos(directory, cifar10, count, **classes):
    """Save the first `count` training images of each class into its own subdirectory, as PNG."""
    for name, label in classes.items():
        (directory / name).mkdir(parents=True)
        for i in np.flatnonzero(cifar10["y_train"][:, 0] == label)[:count]:
            Image.fromarray(cifar10["x_train"][i]).save(directory / name / f"{i}.png")
    return directory


@pytest.fixture(scope="module")
def photos(cifar10, tmp_path_factory):
    directory = tmp_path_factory.mktemp("photos")
    return save_photos(directory / "写真 1", cifar10, 300, automobile=1, 馬=7)


@pytest.fixture(scope="module")
def trained(photos, weights, tmp_path_factory):
    """Where a run with default settings on the photos wrote its files, and what it printed."""
    directory = tmp_path_factory.mktemp("trained")
    stdout, stderr = run(TRANSFER, "--data", photos, "--weights", weights, cwd=directory)
    assert stderr == ""
    return directory, stdout


def answers(stdout):
    """Return {file: [(class, per cent), ...]} as predict_saved.py printed it."""
    return {
        file: [
            (name, float(share)) for name, share in re.findall(r"(?:^|, )(.+?) ([\d.]+)%", rest)
        ]
        for file, rest in re.findall(r"^(.+?): (.+%)$", stdout, re.M)
    }


# ----- training on photos


def test_two_classes_with_default_settings(trained, photos):
    directory, stdout = trained
    assert read_result(stdout)[1] > 0.75
    assert "480 photos from" in stdout
    assert "120 photos from" in stdout
    assert {path.name for path in directory.iterdir()} >= {
        "predictions.png",
        "vgg16_cifar10.keras",
    }
    last = stdout.splitlines()[-1]
    assert re.fullmatch("予測: (automobile|馬), 正解: (automobile|馬)", last)
    assert keras.models.load_model(directory / "vgg16_cifar10.keras").output_shape == (None, 2)


def test_companion_evaluates_on_the_held_out_photos(trained, photos, tmp_path):
    directory, _ = trained
    printed, stderr = run(PREDICT, "--data", photos, cwd=directory)
    assert stderr == ""
    parts, _ = read_parts(photos, tmp_path)
    model = keras.models.load_model(directory / "vgg16_cifar10.keras")
    expected = model.evaluate(parts["x_test"], parts["y_test"], verbose=0)
    assert read_result(printed) == pytest.approx(expected, rel=1e-4)


def test_companion_gives_the_model_s_probabilities(trained, cifar10, tmp_path):
    directory, _ = trained
    images = cifar10["x_test"][:30]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    stdout, stderr = run(PREDICT, tmp_path, cwd=directory)
    assert stderr == ""
    model = keras.models.load_model(directory / "vgg16_cifar10.keras")
    expected = model.predict(images, verbose=0) * 100
    printed = answers(stdout)
    assert list(printed) == [str(tmp_path / f"{i:02}.png") for i in range(30)]
    for found, shares in zip(printed.values(), expected, strict=True):
        assert [share for _, share in found] == sorted((s for _, s in found), reverse=True)
        assert dict(found) == pytest.approx(
            dict(zip(("automobile", "馬"), shares, strict=True)), abs=0.06
        )


def read_parts(photos, tmp_path):
    """Return, as load_photos makes them, the labels of the training and the test photos."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
            import sys
            from pathlib import Path
            sys.path.insert(0, {str(ROOT)!r})
            import numpy as np
            from transfer_vgg16 import load_photos

            (x_train, y_train), (x_test, y_test), names = load_photos(Path({str(photos)!r}), 32)
            np.savez("parts.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
        """)
    )
    stdout, _ = run(program, cwd=tmp_path)
    with np.load(tmp_path / "parts.npz") as file:
        return dict(file), stdout


def test_parts_are_stratified(cifar10, tmp_path):
    photos = save_photos(tmp_path / "photos", cifar10, 100, b=1, a=7)
    save_photos(photos, cifar10, 20, c=3)
    parts, _ = read_parts(photos, tmp_path)
    assert np.bincount(parts["y_test"][:, 0]).tolist() == [20, 20, 4]
    assert np.bincount(parts["y_train"][:, 0]).tolist() == [80, 80, 16]
    validation = parts["y_train"][: int(len(parts["y_train"]) * 0.2), 0]
    assert np.abs(np.bincount(validation) - [16, 16, 3.2]).max() < 1.5
    rows = np.concatenate([parts["x_train"], parts["x_test"]]).reshape(220, -1)
    assert len(np.unique(rows, axis=0)) == 220
    again, _ = read_parts(photos, tmp_path)
    assert all(np.array_equal(parts[name], again[name]) for name in parts)


def test_train_and_test_directories(cifar10, weights, tmp_path):
    save_photos(tmp_path / "photos" / "train", cifar10, 20, car=1, horse=7)
    save_photos(tmp_path / "photos" / "test", cifar10, 5, horse=7, car=1)
    parts, _ = read_parts(tmp_path / "photos", tmp_path)
    assert np.bincount(parts["y_train"][:, 0]).tolist() == [20, 20]
    assert np.bincount(parts["y_test"][:, 0]).tolist() == [5, 5]
    arguments = ["--data", "photos", "--weights", weights, "--epochs", 1, "--image-size", 48]
    stdout, stderr = run(TRANSFER, *arguments, cwd=tmp_path)
    assert stderr == ""
    assert keras.models.load_model(tmp_path / "vgg16_cifar10.keras").input_shape == (
        None,
        48,
        48,
        3,
    )
    printed, stderr = run(PREDICT, "--data", "photos", cwd=tmp_path)
    assert stderr == ""
    assert read_result(printed) == pytest.approx(read_result(stdout), rel=1e-3)


def test_unreadable_photos_are_named_and_left_out(cifar10, tmp_path):
    photos = save_photos(tmp_path / "photos", cifar10, 20, car=1, horse=7)
    (photos / "car" / "notes.txt").write_text("no picture")
    (photos / "car" / ".DS_Store").write_text("hidden")
    (photos / "car" / ".thumbnails").mkdir()
    shutil.copy(sorted((photos / "car").glob("*.png"))[0], photos / "car" / ".thumbnails")
    broken = sorted((photos / "horse").glob("*.png"))[0]
    broken.write_bytes(broken.read_bytes()[:200])
    parts, stdout = read_parts(photos, tmp_path)
    assert len(parts["y_train"]) + len(parts["y_test"]) == 39
    assert re.search(r"notes\.txt is left out: cannot identify image file", stdout)
    assert re.search(rf"{broken.name} is left out: .+", stdout)
    assert "DS_Store" not in stdout


def make_nothing(directory, cifar10):
    pass


def make_one_class(directory, cifar10):
    save_photos(directory, cifar10, 20, car=1)


def make_few(directory, cifar10):
    save_photos(directory, cifar10, 20, car=1)
    save_photos(directory, cifar10, 5, horse=7)


def make_no_test(directory, cifar10):
    save_photos(directory / "train", cifar10, 20, car=1, horse=7)
    save_photos(directory / "validation", cifar10, 20, car=1, horse=7)


def make_more_test(directory, cifar10):
    save_photos(directory / "train", cifar10, 20, car=1, horse=7)
    save_photos(directory / "test", cifar10, 20, car=1, horse=7, cat=3)


def make_no_test_photos(directory, cifar10):
    save_photos(directory / "train", cifar10, 20, car=1, horse=7)
    save_photos(directory / "test", cifar10, 20, car=1)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (make_nothing, "photos needs a subdirectory for each class, two or more, and has 0"),
        (make_one_class, "photos needs a subdirectory for each class, two or more, and has 1"),
        (make_no_test, "photos has train but no test: add test, or give --data photos/train"),
        (make_more_test, "photos/test has classes that photos/train lacks: cat"),
        (make_few, "photos has 4 readable photos of horse to train with, and needs 8: add some"),
        (make_no_test_photos, "photos has 0 readable photos of horse to test with, and needs 1"),
    ],
)
def test_bad_directory(make, sentence, cifar10, tmp_path):
    (tmp_path / "photos").mkdir()
    make(tmp_path / "photos", cifar10)
    arguments = ["--data", "photos", "--output-dir", "out"]
    _, stderr = run(TRANSFER, *arguments, cwd=tmp_path, status=2)
    check_error(stderr, rf"{sentence}.*")
    assert list((tmp_path / "out").iterdir()) == []


# ----- asking about pictures


@pytest.fixture(scope="module")
def files(cifar10, tmp_path_factory):
    """Twenty files that show the same horse, and what they have in common is the picture alone."""
    directory = tmp_path_factory.mktemp("絵 files")
    horses = cifar10["x_train"][cifar10["y_train"][:, 0] == 7]
    horse = Image.fromarray(horses[400])  # of those that no model here was trained on
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
    stdout, stderr = run(PREDICT, *sorted(files.iterdir()), cwd=directory)
    assert stderr == ""
    printed = {file.rsplit("/", 1)[1][:2]: found for file, found in answers(stdout).items()}
    assert len(printed) == 20
    assert {name for name, _ in printed["01"]} == {"automobile", "馬"}
    plain = dict(printed["01"])["馬"]
    assert plain > 80
    for number in ("02", "03", "04", "05", "06", "09", "10", "11", "12", "13"):
        assert dict(printed[number])["馬"] == pytest.approx(plain, abs=6), number
    for found in printed.values():
        assert found[0][0] == "馬"
    assert dict(printed["06"]) == pytest.approx(dict(printed["07"]), abs=0.5)  # lossy files
    assert printed["15"] == printed["16"]
    assert dict(printed["17"]) == pytest.approx(dict(printed["19"]), abs=0.2)
    assert printed["17"] == printed["18"]


def test_turned_picture_is_not_upright_without_its_exif(files, trained, tmp_path):
    """What the tag does is seen: the same picture without it gets another answer."""
    directory, _ = trained
    Image.open(files / "07 turned.jpg").save(tmp_path / "lying.png", exif=b"")
    stdout, _ = run(PREDICT, tmp_path / "lying.png", files / "07 turned.jpg", cwd=directory)
    lying, turned = answers(stdout).values()
    assert lying != turned


def test_broken_file_among_good_ones(files, trained, tmp_path):
    directory, _ = trained
    turned = (files / "07 turned.jpg").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(turned[: len(turned) // 2])
    (tmp_path / "text.png").write_text("no picture")
    good = [files / "01 plain.png", files / "02 large.png"]
    arguments = [good[0], tmp_path / "broken.jpg", tmp_path / "text.png", "no such.jpg", good[1]]
    stdout, stderr = run(PREDICT, *arguments, cwd=directory, status=2)
    assert list(answers(stdout)) == [str(file) for file in good]
    lines = stderr.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ("broken.jpg", "text.png", "no such.jpg"), strict=True):
        assert re.fullmatch(rf"error: .*{name} is skipped: .+", line)


def test_figure(files, trained, tmp_path):
    directory, _ = trained
    stdout, stderr = run(PREDICT, "--figure", tmp_path / "out.png", files, cwd=directory)
    assert stderr == ""
    assert len(answers(stdout)) == 20
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
    stdout, stderr = run(PREDICT, *arguments, cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, rf"{sentence}.*")


def test_directory_without_pictures(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "weights.h5").write_text("no picture")
    stdout, stderr = run(PREDICT, tmp_path, cwd=trained[0], status=2)
    assert stdout == ""
    check_error(stderr, rf"{tmp_path} has no readable pictures in it")


def test_photo_model_is_not_evaluated_on_other_classes(trained, handful, cifar10, tmp_path):
    for arguments in ([], ["--data", handful]):
        _, stderr = run(PREDICT, *arguments, cwd=trained[0], status=2)
        check_error(stderr, r"the model knows automobile, 馬, not CIFAR-10's classes: give it .+")
    other = save_photos(tmp_path / "other", cifar10, 20, cat=3, dog=5)
    _, stderr = run(PREDICT, "--data", other, cwd=trained[0], status=2)
    check_error(stderr, "the model knows automobile, 馬, but .+other has cat, dog.*")


def test_model_of_the_article_s_own_code(files, tmp_path):
    """It has no names of its own: they are CIFAR-10's."""
    save_model(tmp_path / "vgg16_cifar10.keras")
    stdout, stderr = run(PREDICT, files / "01 plain.png", cwd=tmp_path)
    assert stderr == ""
    ((_, found),) = answers(stdout).items()
    assert len(found) == 3
    assert all(re.fullmatch(r"\S+ \([a-z]+\)", name) for name, _ in found)


# ----- the pictures that the training draws


def test_confusion_matrix_and_predictions_say_what_was_predicted(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
            import sys
            from pathlib import Path
            sys.path.insert(0, {str(ROOT)!r})
            import numpy as np
            from transfer_vgg16 import plot_confusion_matrix, plot_predictions, plt

            names = ["cat", "$_$", "frog"]
            labels, predicted = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 2, 1, 1])
            plot_confusion_matrix(predicted, labels, names, Path("matrix.png"), "title")
            axis = plt.gca()
            texts = [text.get_text() for text in axis.texts]
            assert texts[:9] == ["2", "1", "1", "0", "2", "0", "0", "0", "0"], texts
            assert texts[9:] == ["50%", "100%", "-", "recall"], texts
            assert [text.get_text() for text in axis.get_xticklabels()] == names
            assert [text.get_text() for text in axis.get_yticklabels()] == names
            assert axis.get_ylabel() == "True class"

            images = np.zeros((6, 32, 32, 3), np.uint8)
            plot_predictions(images, predicted, labels, names, Path("grid.png"), "")
            titles = [axis.title for axis in plt.gcf().axes if axis.get_title()]
            assert [title.get_text() for title in titles] == [
                "✓ cat", "✓ cat", "✗ $_$\\ntrue: cat", "✗ frog\\ntrue: cat", "✓ $_$", "✓ $_$"
            ]
            colors = [title.get_color() for title in titles]
            assert colors == ["black", "black", "red", "red", "black", "black"]
        """)
    )
    _, stderr = run(program, cwd=tmp_path)
    assert stderr == ""
    assert {path.name for path in tmp_path.glob("*.png")} == {"matrix.png", "grid.png"}


def test_many_classes_and_names_that_no_font_has(tmp_path, cifar10):
    """Twelve classes, one named in a script that few fonts have: no warning, no lost name."""
    names = [f"class{i:02}" for i in range(11)] + ["𓀀𓁐"]
    photos = tmp_path / "photos"
    for i, name in enumerate(names):
        save_photos(photos, cifar10, 12, **{name: i % 10})
    weights = save_weights(tmp_path / "vgg16.weights.h5")
    arguments = ["--data", photos, "--weights", weights, "--epochs", 1]
    _, stderr = run(TRANSFER, *arguments, cwd=tmp_path)
    assert stderr == ""
    shutil.rmtree(photos)
    stdout, _ = run(PREDICT, "confusion_matrix.png", cwd=tmp_path)
    assert len(answers(stdout)["confusion_matrix.png"]) == 3
