"""Folders of photos as people have them: which directory is what, the split, broken pictures."""

import hashlib
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import transfer_vgg16 as photos

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest undoes the script's
OUT = Path("elsewhere")  # an output directory that is not among the photos


def draw(seed, size=(24, 20)):
    """Return a picture that no other seed gives: noise on a ramp."""
    noise = np.random.default_rng(seed).integers(0, 56, (size[1], size[0], 3))
    ramp = np.linspace(0, 200, size[0])[None, :, None]
    return Image.fromarray((ramp + noise).astype("uint8"))


def make(root, layout, form="JPEG"):
    """Write the files of `layout`: "a/b/*.jpg 7" is seven pictures; others are no pictures."""
    for line in layout.split("\n"):
        name, _, count = line.strip().partition(" ")
        if not name:
            continue
        for i in range(int(count or 1)):
            path = root / name.replace("*", f"{i:03}")
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir()
            elif "*" in name:
                seed = int(hashlib.sha256(f"{name} {i}".encode()).hexdigest()[:8], 16)
                draw(seed).save(path, form)
            else:
                path.write_text("<no picture>")
    return root


def sentence(function, *arguments):
    """Return the sentence in which a call ends."""
    with pytest.raises(photos.Failure) as error:
        function(*arguments)
    return str(error.value)


def count_all(files):
    """Return the number of files in all parts."""
    return sum(map(len, files.values()))


def load(directory, size=16):
    """Return what the training makes of a directory: {part: (images, labels)}, class names."""
    return photos.load_photos(directory, size, OUT)


def count(files, class_names):
    """Return {part: {class name: number of files}}."""
    counts = {part: Counter(label for _, label in files[part]) for part in photos.PARTS}
    return {part: {class_names[y]: n for y, n in counts[part].items()} for part in counts}


# ----- which directory is what


DIVIDED = {  # the counts of each class in train, validation and test, as they are
    "roboflow": (
        """
        train/cat/*.jpg 6
        train/dog/*.jpg 7
        valid/cat/*.jpg 3
        valid/dog/*.jpg 2
        test/cat/*.jpg 1
        test/dog/*.jpg 2
        README.dataset.txt
        README.roboflow.txt""",
        {"cat": (6, 3, 1), "dog": (7, 2, 2)},
    ),
    "chest_xray with a copy": (
        """
        chest_xray/train/NORMAL/*.jpeg 6
        chest_xray/train/PNEUMONIA/*.jpeg 7
        chest_xray/val/NORMAL/*.jpeg 2
        chest_xray/val/PNEUMONIA/*.jpeg 2
        chest_xray/test/NORMAL/*.jpeg 3
        chest_xray/test/PNEUMONIA/*.jpeg 4
        chest_xray/chest_xray/train/NORMAL/*.jpeg 6
        chest_xray/chest_xray/train/PNEUMONIA/*.jpeg 7
        chest_xray/chest_xray/val/NORMAL/*.jpeg 2
        chest_xray/chest_xray/val/PNEUMONIA/*.jpeg 2
        chest_xray/chest_xray/test/NORMAL/*.jpeg 3
        chest_xray/chest_xray/test/PNEUMONIA/*.jpeg 4
        chest_xray/__MACOSX/chest_xray/train/NORMAL/._000.jpeg""",
        {"NORMAL": (6, 2, 3), "PNEUMONIA": (7, 2, 4)},
    ),
    "upper case, words around, validation and test": (
        """
        My-TRAIN-2019/a/*.jpg 5
        My-TRAIN-2019/b/*.jpg 5
        My-Dev-2019/a/*.jpg 2
        My-Dev-2019/b/*.jpg 2
        MyTestSet/a/*.jpg 1
        MyTestSet/b/*.jpg 1""",
        {"a": (5, 2, 1), "b": (5, 2, 1)},
    ),
}
VALIDATED = {  # without test: the counts in train and validation, which tests as well
    "hymenoptera_data": (
        """
        hymenoptera_data/train/ants/*.jpg 6
        hymenoptera_data/train/bees/*.jpg 5
        hymenoptera_data/val/ants/*.jpg 3
        hymenoptera_data/val/bees/*.jpg 4""",
        {"ants": (6, 3), "bees": (5, 4)},
    ),
    "imagenette2": (
        """
        imagenette2/train/n01440764/*.JPEG 6
        imagenette2/train/n02102040/*.JPEG 5
        imagenette2/val/n01440764/*.JPEG 3
        imagenette2/val/n02102040/*.JPEG 2
        imagenette2/noisy_imagenette.csv""",
        {"n01440764": (6, 3), "n02102040": (5, 2)},
    ),
    "cats_and_dogs_filtered": (
        """
        train/cats/*.jpg 6
        train/dogs/*.jpg 5
        validation/cats/*.jpg 3
        validation/dogs/*.jpg 2
        vectorize.py""",
        {"cats": (6, 3), "dogs": (5, 2)},
    ),
    "monkeys": (
        """
        training/training/n0/*.jpg 6
        training/training/n1/*.jpg 5
        validation/validation/n0/*.jpg 3
        validation/validation/n1/*.jpg 2
        monkey_labels.txt""",
        {"n0": (6, 3), "n1": (5, 2)},
    ),
}
TESTED = {  # without validation: the counts in train and validation together, and in test
    "brain tumour MRI": (
        """
        Training/glioma/*.jpg 12
        Training/notumor/*.jpg 10
        Testing/glioma/*.jpg 3
        Testing/notumor/*.jpg 2""",
        {"glioma": (12, 3), "notumor": (10, 2)},
    ),
    "cat and dog": (
        """
        training_set/training_set/cats/*.jpg 12
        training_set/training_set/dogs/*.jpg 10
        training_set/training_set/cats/_DS_Store
        test_set/test_set/cats/*.jpg 3
        test_set/test_set/dogs/*.jpg 2""",
        {"cats": (12, 3), "dogs": (10, 2)},
    ),
    "Intel": (
        """
        archive/seg_train/seg_train/buildings/*.jpg 12
        archive/seg_train/seg_train/sea/*.jpg 10
        archive/seg_test/seg_test/buildings/*.jpg 3
        archive/seg_test/seg_test/sea/*.jpg 2
        archive/seg_pred/seg_pred/*.jpg 9""",
        {"buildings": (12, 3), "sea": (10, 2)},
    ),
    "fruits-360": (
        """
        fruits-360/Training/Apple-Red-1/*.jpg 12
        fruits-360/Training/Kiwi/*.jpg 10
        fruits-360/Test/Apple-Red-1/*.jpg 3
        fruits-360/Test/Kiwi/*.jpg 2
        fruits-360/test-multiple_fruits/*.jpg 5
        fruits-360/papers/fruits.pdf""",
        {"Apple-Red-1": (12, 3), "Kiwi": (10, 2)},
    ),
    "originals beside the parts": (
        """
        train/a/*.jpg 12
        train/b/*.jpg 10
        test/a/*.jpg 3
        test/b/*.jpg 2
        a/*.jpg 15
        b/*.jpg 12""",
        {"a": (12, 3), "b": (10, 2)},
    ),
}
UNDIVIDED = {  # how many files each class has
    "flower_photos": (
        """
        flower_photos/daisy/*.jpg 11
        flower_photos/tulips/*.jpg 12
        flower_photos/LICENSE.txt""",
        {"daisy": 11, "tulips": 12},
    ),
    "PetImages": (
        """
        Cat/*.jpg 11
        Dog/*.jpg 12
        Cat/Thumbs.db
        Dog/Thumbs.db""",
        {"Cat": 11, "Dog": 12},
    ),
    "PetImages' parent": (
        """
        PetImages/Cat/*.jpg 11
        PetImages/Dog/*.jpg 12
        PetImages/Cat/Thumbs.db
        readme[1].txt
        MSR-LA-3467.docx""",
        {"Cat": 11, "Dog": 12},
    ),
    "food-101": (
        """
        food-101/images/apple_pie/*.jpg 11
        food-101/images/waffles/*.jpg 12
        food-101/meta/classes.txt
        food-101/meta/train.json
        food-101/license_agreement.txt""",
        {"apple_pie": 11, "waffles": 12},
    ),
    "caltech-101": (
        """
        caltech-101/101_ObjectCategories/accordion/*.jpg 11
        caltech-101/101_ObjectCategories/yin_yang/*.jpg 12
        caltech-101/Annotations/accordion/annotation_0001.mat
        caltech-101/Annotations/yin_yang/annotation_0001.mat
        caltech-101/show_annotation.m
        __MACOSX/caltech-101/._show_annotation.m
        __MACOSX/caltech-101/*.jpg 3""",
        {"accordion": 11, "yin_yang": 12},
    ),
    "brain MRI": (
        """
        yes/*.jpg 11
        no/*.jpg 12
        brain_tumor_dataset/yes/*.jpg 11
        brain_tumor_dataset/no/*.jpg 12""",
        {"no": 12, "yes": 11},
    ),
    "cell_images": (
        """
        cell_images/Parasitized/*.png 11
        cell_images/Uninfected/*.png 12
        cell_images/cell_images/Parasitized/*.png 11
        cell_images/cell_images/Uninfected/*.png 12""",
        {"Parasitized": 11, "Uninfected": 12},
    ),
    "tiny-imagenet": (
        """
        tiny-imagenet-200/train/n01443537/images/*.JPEG 11
        tiny-imagenet-200/train/n01629819/images/*.JPEG 12
        tiny-imagenet-200/train/n01443537/n01443537_boxes.txt
        tiny-imagenet-200/val/images/*.JPEG 8
        tiny-imagenet-200/val/val_annotations.txt
        tiny-imagenet-200/test/images/*.JPEG 9
        tiny-imagenet-200/wnids.txt""",
        {"n01443537": 11, "n01629819": 12},
    ),
    "Stanford Dogs": (
        """
        Images/n02085620-Chihuahua/*.jpg 11
        Images/n02116738-African_hunting_dog/*.jpg 12
        Annotation/n02085620-Chihuahua/n02085620_7
        Annotation/n02116738-African_hunting_dog/n02116738_24""",
        {"n02085620-Chihuahua": 11, "n02116738-African_hunting_dog": 12},
    ),
    "ASL alphabet": (
        """
        asl_alphabet_train/asl_alphabet_train/A/*.jpg 11
        asl_alphabet_train/asl_alphabet_train/B/*.jpg 12
        asl_alphabet_test/asl_alphabet_test/*.jpg 3""",
        {"A": 11, "B": 12},
    ),
    "a class called train": (
        """
        plane/*.jpg 11
        car/*.jpg 12
        train/*.jpg 13""",
        {"car": 12, "plane": 11, "train": 13},
    ),
    "an empty directory, hidden ones, the system's": (
        """
        cat/*.jpg 11
        cat/.thumbnails/*.jpg 5
        cat/@eaDir/*.jpg 5
        dog/*.jpg 12
        dog/._1.jpg
        .git/*.jpg 5
        @eaDir/*.jpg 5
        new-folder/
        notes/readme.txt""",
        {"cat": 11, "dog": 12},
    ),
    "classes with directories in them": (
        """
        cat/white/*.jpg 5
        cat/black/*.jpg 6
        dog/*.jpg 10
        dog/2019/summer/*.jpg 2""",
        {"cat": 11, "dog": 12},
    ),
    "no extensions": (
        """
        cat/* 11
        dog/* 12
        dog/LICENSE""",
        {"cat": 11, "dog": 12},
    ),
}


def read_counts(directory, capsys, output_dir=OUT):
    files, class_names = photos.find_photos(directory, output_dir)
    printed = capsys.readouterr().out
    counts = count(files, class_names)
    for name in class_names:  # what is printed is what is returned
        row = [str(counts[part].get(name, 0)) for part in photos.PARTS]
        assert [*row, name] in [line.split() for line in printed.split("\n")]
    return counts, files, class_names, printed


@pytest.mark.parametrize("layout, expected", DIVIDED.values(), ids=DIVIDED)
def test_divided(layout, expected, tmp_path, capsys):
    counts, *_ = read_counts(make(tmp_path, layout), capsys)
    found = {name: tuple(counts[part][name] for part in counts) for name in counts["train"]}
    assert found == expected


@pytest.mark.parametrize("layout, expected", VALIDATED.values(), ids=VALIDATED)
def test_validation_serves_as_test(layout, expected, tmp_path, capsys):
    counts, files, _, printed = read_counts(make(tmp_path, layout), capsys)
    found = {name: (counts["train"][name], counts["test"][name]) for name in counts["train"]}
    assert found == expected
    assert files["test"] == files["validation"]
    assert "the validation pictures are used for both" in printed


@pytest.mark.parametrize("layout, expected", TESTED.values(), ids=TESTED)
def test_validation_comes_from_train(layout, expected, tmp_path, capsys):
    counts, *_ = read_counts(make(tmp_path, layout), capsys)
    both = {name: counts["train"][name] + counts["validation"][name] for name in expected}
    assert {name: (both[name], counts["test"][name]) for name in both} == expected
    assert counts["train"].keys() == expected.keys()


@pytest.mark.parametrize("layout, expected", UNDIVIDED.values(), ids=UNDIVIDED)
def test_undivided(layout, expected, tmp_path, capsys):
    _, files, class_names, _ = read_counts(make(tmp_path, layout), capsys)
    assert class_names == sorted(expected)
    photos_of_all = [file for part in photos.PARTS for file in files[part]]
    assert Counter(class_names[label] for _, label in photos_of_all) == expected


LEFT_ASIDE = {
    "flat pictures": (TESTED["Intel"][0], ["seg_pred"]),
    "copy": (UNDIVIDED["brain MRI"][0], ["brain_tumor_dataset"]),
    "no pictures": (UNDIVIDED["food-101"][0], ["meta"]),
    "hidden": (
        UNDIVIDED["an empty directory, hidden ones, the system's"][0],
        [".git, .thumbnails, @eaDir", "new-folder", "notes"],
    ),
}


@pytest.mark.parametrize("layout, names", LEFT_ASIDE.values(), ids=LEFT_ASIDE)
def test_one_line_for_each_directory_left_aside(layout, names, tmp_path, capsys):
    photos.find_photos(make(tmp_path, layout), OUT)
    lines = [line for line in capsys.readouterr().out.split("\n") if "left aside" in line]
    assert len(lines) == len(names)
    for name in names:
        assert any(f"{name} (" in line for line in lines)


ERRORS = {
    "sorted by class and answer": (
        """
        train/cat/cat/*.jpg 6
        train/cat/dog/*.jpg 6
        train/cat/fox/*.jpg 6
        train/dog/cat/*.jpg 6
        train/dog/dog/*.jpg 6
        train/dog/fox/*.jpg 6
        train/fox/cat/*.jpg 6
        train/fox/dog/*.jpg 6
        train/fox/fox/*.jpg 6
        test/cat/*.jpg 6
        test/dog/*.jpg 6
        test/fox/*.jpg 6""",
        "too few readable photos: cat has 0 for train, dog has 0 for train, .+",
    ),
    "a class, or pictures to test with": (
        """
        beaker/*.jpg 11
        test_tube/*.jpg 12""",
        "unclear whether .*test_tube is a class or held-out pictures: rename it",
    ),
    "a test without train": (
        """
        cat/*.jpg 9
        dog/*.jpg 9
        test/cat/*.jpg 3
        test/dog/*.jpg 3""",
        "test is a class or .* put the classes to train with into a directory train",
    ),
    "dogs-vs-cats, flat": (
        """
        train/cat.*.jpg 9
        train/dog.*.jpg 9
        test1/*.jpg 5
        sampleSubmission.csv""",
        "to train with in .*test1 or .*train: sort the pictures into train/cat, train/dog",
    ),
    "two train parts of other classes": (
        """
        train1/cat/*.jpg 6
        train1/dog/*.jpg 6
        train2/bird/*.jpg 6
        train2/fish/*.jpg 6
        test/cat/*.jpg 6
        test/dog/*.jpg 6""",
        "train1 and .*train2 may both be the train part: move one of them elsewhere",
    ),
    "flat parts beside other pictures": (
        """
        train/*.jpg 9
        test/*.jpg 5
        more/*.jpg 5""",
        "no class directories to train with",
    ),
    "flat": ("*.jpg 9", "needs a directory for each class, two or more, .* has 0"),
    "one class": ("cat/*.jpg 9", r"needs a directory for each class, .* has 1 \(cat\)"),
    "one class, another without pictures": (
        """
        photos/cat/*.jpg 9
        photos/dog/readme.txt""",
        "needs a directory for each class",
    ),
    "nothing": ("readme.txt", r"needs a directory for each class, .* has 0 \(none\)"),
    "train: the part or a class": (
        """
        train/steam/*.jpg 9
        train/electric/*.jpg 9
        plane/*.jpg 9
        car/*.jpg 9""",
        "train may be the train part or a class: give --data its path, or rename it",
    ),
    "two train parts": (
        """
        train/a/*.jpg 9
        train/b/*.jpg 9
        train_small/a/*.jpg 9
        train_small/b/*.jpg 9
        test/a/*.jpg 9
        test/b/*.jpg 9""",
        "train and .*train_small may both be the train part",
    ),
    "only test and validation": (
        """
        test/a/*.jpg 9
        test/b/*.jpg 9
        val/a/*.jpg 9
        val/b/*.jpg 9""",
        "no class directories to train with",
    ),
    "the parts in the classes": (
        """
        cat/train/*.jpg 9
        cat/test/*.jpg 9
        dog/train/*.jpg 9
        dog/test/*.jpg 9""",
        "cat looks like a data set inside a class",
    ),
    "two sets": (
        """
        small/Training/a/*.jpg 9
        small/Training/b/*.jpg 9
        small/Test/a/*.jpg 9
        large/Training/a/*.jpg 9
        large/Training/b/*.jpg 9
        large/Test/a/*.jpg 9""",
        "large looks like a data set inside a class",
    ),
    "a class that was not trained": (
        """
        train/a/*.jpg 9
        train/b/*.jpg 9
        test/a/*.jpg 9
        test/b/*.jpg 9
        test/c/*.jpg 9
        test/d/*.jpg 9""",
        "too few readable photos: c has 0 for train, d has 0 for train",
    ),
    "too few, all at once": (
        """
        train/a/*.jpg 1
        train/b/*.jpg 9
        train/c/*.jpg 9
        val/a/*.jpg 2
        val/b/*.jpg 2
        val/c/*.jpg 2
        test/a/*.jpg 2
        test/c/*.jpg 2""",
        "too few readable photos: a has 1 for train, b has 0 for test: add some",
    ),
}


@pytest.mark.parametrize("layout, message", ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_trained_on_ends_in_a_sentence(layout, message, tmp_path):
    assert re.search(message, sentence(load, make(tmp_path, layout)))


TWO = """
    cat/*.jpg 11
    dog/*.jpg 12"""


def test_nothing_is_decoded_before_the_table(tmp_path, capsys):
    make(tmp_path, TWO)
    for path in tmp_path.glob("*/*.jpg"):
        path.write_bytes(b"no picture, but of its own: " + str(path).encode())
    _, files, *_ = read_counts(tmp_path, capsys)
    assert count_all(files) == 23


@pytest.mark.parametrize("where", ["trained", "trained/cat", "cat/trained"])
def test_output_of_runs_is_no_class(where, tmp_path, capsys):
    make(tmp_path, TWO)
    make(tmp_path, f"{where}/*.png 7", "PNG")
    _, files, class_names, printed = read_counts(tmp_path, capsys, tmp_path / "trained")
    (tmp_path / where / photos.MODEL_FILE).touch()
    _, again, class_names, printed = read_counts(tmp_path, capsys)  # written to in an earlier run
    assert class_names == ["cat", "dog"]
    assert count_all(again) == 23
    assert "trained" in printed
    assert "a run writes its files there" in printed
    assert where == "cat/trained" or count_all(files) == 23


def test_photos_directory_may_be_the_output_directory(tmp_path, capsys):
    make(tmp_path, TWO)
    (tmp_path / photos.MODEL_FILE).touch()
    draw(1).save(tmp_path / "loss.png")
    _, files, *_ = read_counts(tmp_path, capsys, tmp_path)
    assert count_all(files) == 23


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right of their own there")
def test_links(tmp_path, capsys):
    root = make(tmp_path / "photos", TWO)
    make(tmp_path / "more", "bird/*.jpg 9")
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "higher").symlink_to(tmp_path)
    (root / "dog" / "self").symlink_to(root / "dog")
    (root / "bird").symlink_to(tmp_path / "more" / "bird")
    (tmp_path / "more" / "bird" / "back").symlink_to(root)
    (root / "dog" / "lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    _, files, class_names, printed = read_counts(root, capsys)
    assert class_names == ["bird", "cat", "dog"]
    assert count_all(files) == 23 + 9
    (line,) = [line for line in printed.split("\n") if "a link that leads back" in line]
    assert line.count(", ") == 3


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="names are Unicode there")
def test_names_from_a_shift_jis_archive(tmp_path, capsys):
    make(tmp_path, TWO)
    for name, new in (("cat", "猫"), ("dog", "犬")):
        os.rename(tmp_path / name, os.fsencode(tmp_path) + b"/" + new.encode("shift_jis"))
    _, files, class_names, _ = read_counts(tmp_path, capsys)
    assert class_names == [r"\x8c\xa2", r"\x94L"]
    (broken, _), *_ = files["train"]
    broken.write_bytes(b"")
    load(tmp_path)
    assert rf"{os.sep}{class_names[files['train'][0][1]]}{os.sep}" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_unreadable_directory_is_a_line(tmp_path, capsys):
    make(tmp_path, TWO + "\ncat/private/*.jpg 3")
    (tmp_path / "cat" / "private").chmod(0)
    _, files, _, printed = read_counts(tmp_path, capsys)
    (tmp_path / "cat" / "private").chmod(0o700)
    assert count_all(files) == 23
    assert "private (Permission denied)" in printed


def test_other_files_are_counted_not_listed(tmp_path, capsys):
    make(tmp_path, TWO + "\ncat/song.mp3\ncat/readme\ndog/film.mpg\ndog/paper.pdf\nx.csv")
    _, _, _, printed = read_counts(tmp_path, capsys)
    assert "23 pictures in 2 classes; 0 other pictures and 5 other files are not used" in printed
    assert "song" not in printed


def test_pictures_for_the_companion(tmp_path):
    make(tmp_path, "*.jpg 2\nb/a/*.png 1\na/photo.JPG/*.jpg 1\nnotes.txt\n.hidden/*.jpg 3", "PNG")
    pictures, _, others = photos.find_pictures(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in pictures]
    assert names == ["000.jpg", "001.jpg", "a/photo.JPG/000.jpg", "b/a/000.png"]
    assert others == 1


# ----- the split


def parts_by_content(directory):
    """Return {(class, content): part}."""
    files, class_names = photos.find_photos(directory, OUT)
    return {
        (class_names[label], path.read_bytes()): part
        for part in photos.PARTS
        for path, label in files[part]
    }


def test_no_photo_changes_its_part(tmp_path):
    make(tmp_path, "cat/*.png 60\ndog/*.png 50", "PNG")
    before = parts_by_content(tmp_path)
    shares = Counter(before.values())
    assert 10 <= shares["test"] <= 35  # 22 of 110
    assert 7 <= shares["validation"] <= 30  # 18 of 110
    for i, path in enumerate(sorted(tmp_path.glob("cat/*.png"))):
        path.rename(path.with_name(f"{97 * i % 60} renamed.png"))
    for i, path in enumerate(sorted(tmp_path.glob("dog/*.png"))[::3]):
        path.with_name(f"copy {i}.png").write_bytes(path.read_bytes())
    make(tmp_path, "cat/more/*.png 40\ndog/a*.png 90", "PNG")
    after = parts_by_content(tmp_path)
    assert len(after) == 110 + 130
    assert {photo: after[photo] for photo in before} == before


def test_what_was_trained_on_is_never_held_out_later():
    """But for the three highest numbers: chance may put all of a class below the bounds."""
    order = {"test": 0, "validation": 1, "train": 2}
    for seed in range(300):
        numbers = np.random.default_rng(seed).random(40).tolist()
        for missing in (["test", "validation"], ["validation"]):
            before = {}
            for count in range(1, len(numbers) + 1):
                held_out = photos.hold_out(numbers[:count], missing)
                assert count < 5 or set(missing) == set(held_out.values())
                assert count < 5 or len(held_out) <= count - 2
                now = {x: order[held_out.get(x, "train")] for x in numbers[:count]}
                moved = {x for x in before if now[x] < before[x]}
                assert moved <= set(sorted(before)[-3:])
                before = now


def test_ten_of_a_class_are_enough(tmp_path):
    names = [f"c{i:02}" for i in range(40)]
    make(tmp_path, "\n".join(f"{name}/*.jpg 10" for name in names))
    files, class_names = photos.find_photos(tmp_path, OUT)
    counts = count(files, class_names)
    assert all(counts[part].keys() == set(names) for part in photos.PARTS)


def test_parts_mix_the_classes(tmp_path):
    make(tmp_path, "a/*.jpg 60\nb/*.jpg 60")
    files, _ = photos.find_photos(tmp_path, OUT)
    labels = [label for _, label in files["train"]]
    assert 10 <= sum(labels[:40]) <= 30


def test_same_pictures_in_parts_and_classes_are_told(tmp_path, capsys):
    make(tmp_path, DIVIDED["roboflow"][0])
    for i in range(2):
        copy = tmp_path / "test" / "cat" / f"copy{i}.jpg"
        copy.write_bytes((tmp_path / "train" / "cat" / f"00{i}.jpg").read_bytes())
    (tmp_path / "train" / "cat" / "d.jpg").write_bytes(
        (tmp_path / "train" / "dog" / "000.jpg").read_bytes()
    )
    for i in range(2):  # files without content are no copies of each other
        (tmp_path / ("train", "test")[i] / "dog" / "empty.jpg").touch()
    photos.find_photos(tmp_path, OUT)
    printed = capsys.readouterr().out
    assert "4 pictures are in several parts, so results will look too good" in printed
    assert "2 pictures are in several classes, so one of them must be wrong" in printed


# ----- broken pictures


def cut(data):
    return data[: len(data) * 2 // 3]


def halve(data):
    return data[: len(data) // 2]


def zero(data):
    half = len(data) // 2
    return data[:half] + bytes(len(data) // 6) + data[half + len(data) // 6 :]


def zero_end(data):
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def overwrite(data):
    return data[: len(data) // 2] + b"\xff" * 90 + data[len(data) // 2 + 90 :]


def wrong_header(data):
    return b"<html>" + data[6:]


def empty(data):
    return b""


FORMS = {
    "jpg": {"format": "JPEG"},
    "png": {"format": "PNG"},
    "smooth.png": {"format": "PNG"},
    "gif": {"format": "GIF"},
    "lzw.tif": {"format": "TIFF", "compression": "tiff_lzw"},
    "deflate.tif": {"format": "TIFF", "compression": "tiff_deflate"},
    "webp": {"format": "WEBP"},
    "bmp": {"format": "BMP"},
    "jp2": {"format": "JPEG2000"},
    "heic": {"format": "HEIF"},
}
HARMS = [cut, halve, zero, zero_end, overwrite, wrong_header, empty]
BLIND = {  # what no decoder tells: the pixels are other ones, but as good as any
    ("jpg", zero),
    ("jpg", zero_end),
    ("heic", zero),
    ("heic", zero_end),
    ("webp", zero),
    ("webp", zero_end),
    ("webp", overwrite),
    ("bmp", zero),
    ("bmp", zero_end),
    ("bmp", overwrite),
    ("jp2", zero),
    ("jp2", overwrite),
    ("heic", overwrite),
}


HARMED = [(name, harm) for name in FORMS for harm in HARMS if (name, harm) not in BLIND]


@pytest.mark.parametrize("exif", [False, True], ids=["upright", "turned"])
@pytest.mark.parametrize("name, harm", HARMED)
def test_broken_pictures_are_named_or_read_whole(name, harm, exif, tmp_path, capsys):
    image = Image.linear_gradient("L").convert("RGB") if "smooth" in name else draw(1, (160, 120))
    settings = dict(FORMS[name])
    if exif and name not in ("gif", "bmp", "jp2"):
        settings["exif"] = Image.Exif()
        settings["exif"][0x0112] = 6
    whole, broken = tmp_path / f"whole.{name}", tmp_path / f"broken.{name}"
    image.save(whole, **settings)
    broken.write_bytes(harm(whole.read_bytes()))
    images, readable, errors = photos.read_photos([whole, broken, whole], 32)
    assert (images[0] == images[-1]).all()
    if errors:
        assert f"{broken} is left out: " in capsys.readouterr().err
        assert readable.tolist() == [0, 2]
    else:
        assert (images[1] == images[0]).all()


def test_names_that_lie(tmp_path):
    draw(1).save(tmp_path / "IMG_1.JPG", "HEIF", quality=100)
    draw(1).save(tmp_path / "IMG_2.HEIC", "JPEG", quality=100)
    draw(1).save(tmp_path / "IMG_3", "PNG")
    pictures, _, others = photos.find_pictures(tmp_path)
    assert (len(pictures), others) == (3, 0)
    one, two, three = (photos.read_photo(path, 20).astype(int) for path in pictures)
    assert abs(one - three).mean() < 12
    assert abs(two - three).mean() < 12


# ----- arrays


def test_arrays_hold_each_photo_once_with_its_label(tmp_path):
    make(tmp_path, TWO)
    files, class_names = photos.find_photos(tmp_path, OUT)
    data, names = load(tmp_path)
    assert names == class_names
    assert sum(len(images) for images, _ in data.values()) == 23
    for part, (x, y) in data.items():
        assert x.shape == (len(files[part]), 16, 16, 3)
        assert x.dtype == np.uint8
        assert y[:, 0].tolist() == [label for _, label in files[part]]
        for image, (path, _) in zip(x, files[part], strict=True):
            assert (image == photos.read_photo(path, 16)).all()


def test_validation_that_tests_as_well(tmp_path):
    make(tmp_path, VALIDATED["hymenoptera_data"][0])
    data, _ = load(tmp_path)
    assert len(data["test"][0]) == 7
    assert data["test"] is data["validation"]


def test_unreadable_photos_are_named_then_counted(tmp_path, capsys):
    make(tmp_path, "cat/*.jpg 30\ndog/*.jpg 30")
    broken = sorted(tmp_path.glob("cat/*.jpg"))[:14]
    for path in broken:
        path.write_bytes(path.read_bytes()[:500])
    data, _ = load(tmp_path)
    printed = capsys.readouterr().err
    assert printed.count(" is left out: ") == 10
    assert "4 more pictures cannot be read either" in printed
    assert sum(len(images) for images, _ in data.values()) == 46
    assert all(len(images) == len(labels) for images, labels in data.values())


def test_classes_too_small_once_read_are_told_at_once(tmp_path):
    make(tmp_path, "cat/*.jpg 10\ndog/*.jpg 10\neel/*.jpg 10")
    for path in [*tmp_path.glob("cat/*.jpg"), *tmp_path.glob("eel/*.jpg")]:
        path.write_bytes(path.read_bytes()[:-30])
    few = "cat has 0 for train, eel has 0 for train, cat has 0 for validation"
    assert few in sentence(load, tmp_path)


def test_too_many_for_the_memory(tmp_path):
    make(tmp_path, TWO)
    told = sentence(load, tmp_path, 10**6)
    fits = int(re.search(r"23 photos .*: choose --image-size (\d+)$", told)[1])
    assert 23 * fits**2 * 3 <= photos.psutil.virtual_memory().total
