"""FrozenOnce trains what Keras trains, with the same numbers, whatever the model is."""

import errno
import os
import re
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import transfer_vgg16
from transfer_vgg16 import FrozenOnce, find_front

SIDE, COUNT = 8, 48
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (COUNT, SIDE, SIDE, 3), "uint8")
LABELS = RANDOM.integers(0, 4, (COUNT, 1))
X_VAL, Y_VAL = IMAGES[:20] // 2, LABELS[:20]


def freeze(model, last):
    """Freeze all layers of `model` up to the one called `last`."""
    names = [layer.name for layer in model.layers]
    for layer in model.layers[: names.index(last) + 1]:
        layer.trainable = False
    return model


def compile_it(model, rate=0.05, **settings):
    settings = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]} | settings
    model.compile(keras.optimizers.SGD(rate, momentum=0.9), **settings)
    return model


def make_plain(first=None):
    """A convolution, frozen, and a head with Dropout."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((SIDE, SIDE, 3))
    x = first(x) if first else x
    x = layers.Conv2D(4, 3, activation="relu", name="first")(x / 255.0)
    x = layers.Conv2D(4, 3, activation="relu", name="second")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(16, activation="relu", name="hidden")(x)
    x = layers.Dropout(0.5)(x)
    return freeze(keras.Model(inputs, layers.Dense(4, activation="softmax")(x)), "second")


def make_branches():
    """A frozen residual block whose BatchNormalization has statistics of its own."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((SIDE, SIDE, 3))
    x = layers.Conv2D(4, 3, padding="same", name="conv")(x / 255.0)
    side = layers.BatchNormalization(name="norm")(x)
    side = layers.Conv2D(4, 3, padding="same", name="side")(side)
    x = layers.Add(name="add")([x, side])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.BatchNormalization(name="head_norm")(x)
    model = freeze(keras.Model(inputs, layers.Dense(4, activation="softmax")(x)), "add")
    model.get_layer("norm").moving_mean.assign([1.0, 2.0, 3.0, 4.0])
    return model


def make_nested():
    """A frozen base that is one layer of a Sequential model."""
    keras.utils.set_random_seed(0)
    base = keras.Sequential([layers.Conv2D(4, 3), layers.BatchNormalization()], name="base")
    base.trainable = False
    head = [layers.Flatten(), layers.Dense(4, activation="softmax")]
    return keras.Sequential([keras.Input((SIDE, SIDE, 3)), layers.Rescaling(1 / 255), base, *head])


def train_both(make, directory, epochs=3, **settings):
    """Train two models that `make` makes alike, one by Keras; return both [(model, history)]."""
    results = []
    for wrap in (lambda model: model, lambda model: FrozenOnce(model, directory)):
        model = compile_it(make())
        history = wrap(model).fit(
            IMAGES,
            LABELS,
            epochs=epochs,
            batch_size=10,
            validation_data=(X_VAL, Y_VAL),
            verbose=0,
            **settings,
        )
        results.append((model, history))
    return results


def check_same(results, tolerance=1e-6):
    """Check that both models and histories are the same."""
    (plain, theirs), (fast, ours) = results
    assert ours.history.keys() == theirs.history.keys()
    assert ours.epoch == theirs.epoch
    for name in ours.history:
        np.testing.assert_allclose(ours.history[name], theirs.history[name], atol=tolerance)
    for one, other in zip(plain.get_weights(), fast.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


# ----- the numbers are Keras's


@pytest.mark.parametrize("make", [make_plain, make_branches, make_nested])
def test_numbers_are_those_of_the_plain_fit(make, tmp_path):
    results = train_both(make, tmp_path)
    check_same(results)
    assert len(list(tmp_path.iterdir())) == 2  # the images to train and to validate with
    (plain, _), (model, _) = results
    fast = FrozenOnce(model, tmp_path)
    expected = plain.evaluate(IMAGES, LABELS, verbose=0)
    assert fast.evaluate(IMAGES, LABELS, verbose=0) == pytest.approx(expected, abs=1e-5)
    named = plain.evaluate(IMAGES, LABELS, verbose=0, return_dict=True)
    result = fast.evaluate(IMAGES, LABELS, verbose=0, return_dict=True)
    assert result == pytest.approx(named, abs=1e-5)
    preds = fast.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(preds, plain.predict(IMAGES, verbose=0), atol=1e-6)


@pytest.mark.parametrize("layer", [layers.RandomFlip(seed=1), layers.GaussianNoise(0.5, seed=1)])
def test_random_layer_before_the_base_is_as_random_as_in_keras(layer, tmp_path, capsys):
    """Nothing runs once then, and nothing is stored."""

    def make():
        return make_plain(type(layer).from_config(layer.get_config()))

    check_same(train_both(make, tmp_path))
    assert list(tmp_path.iterdir()) == []
    FrozenOnce(compile_it(make()), tmp_path).fit(IMAGES, LABELS, verbose=2)
    line = "All layers run in every epoch: "
    assert f"{line}{layer.name} is trainable, or random" in capsys.readouterr().out


def test_thawing_is_as_in_keras(tmp_path, capsys):
    """Set `trainable`, compile, fit again. Without compile(), nothing changes, as there."""
    histories, models = [], []
    for wrap in (lambda model: model, lambda model: FrozenOnce(model, tmp_path, stop="first")):
        model = compile_it(make_plain())
        fast = wrap(model)
        fast.fit(IMAGES, LABELS, epochs=2, validation_data=(X_VAL, Y_VAL), verbose=0)
        model.get_layer("second").trainable = True
        before = model.get_layer("second").get_weights()
        fast.fit(IMAGES, LABELS, verbose=0)
        np.testing.assert_array_equal(before[0], model.get_layer("second").get_weights()[0])
        capsys.readouterr()
        compile_it(model, 0.01)
        history = fast.fit(
            IMAGES, LABELS, epochs=5, initial_epoch=2, validation_data=(X_VAL, Y_VAL), verbose=2
        )
        histories.append(history)
        models.append(model)
        assert not np.array_equal(before[0], model.get_layer("second").get_weights()[0])
    printed = capsys.readouterr().out
    assert "The layers up to first are frozen and run once; second is trained first" in printed
    assert "run over" not in printed  # its outputs were kept, as it is a named stop
    check_same(list(zip(models, histories, strict=True)))


def test_all_layers_thawed(tmp_path):
    def make():
        model = make_plain()
        for layer in model.layers:
            layer.trainable = True
        return model

    check_same(train_both(make, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_weights_of_classes_and_samples(tmp_path):
    weights = {label: label + 1.0 for label in range(4)}
    check_same(train_both(make_plain, tmp_path, class_weight=weights))
    check_same(train_both(make_plain, tmp_path, class_weight={0: 5.0}))  # the others: 1
    check_same(train_both(make_plain, tmp_path, sample_weight=RANDOM.random(COUNT)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet50V2", "MobileNetV2"])
def test_numbers_of_known_networks(name, tmp_path):
    """At 32 pixels, with random weights; frozen BatchNormalization stays as in inference."""
    images = RANDOM.integers(0, 256, (120, 32, 32, 3), "uint8")
    labels = RANDOM.integers(0, 4, 120)
    results = []
    for wrap in (lambda model: model, lambda model: FrozenOnce(model, tmp_path)):
        keras.utils.set_random_seed(0)
        base = getattr(keras.applications, name)(
            include_top=False, weights=None, input_shape=(32, 32, 3)
        )
        base.trainable = False
        x = layers.GlobalAveragePooling2D()(base.output)
        x = layers.Dropout(0.5)(x)
        model = keras.Model(base.input, layers.Dense(4, activation="softmax")(x))
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        history = wrap(model).fit(images, labels, epochs=4, validation_data=(images, labels))
        results.append((model, history))
    check_same(results, 5e-4)


# ----- where the front ends


def names_of(stops):
    return [stop._keras_history.operation.name for stop in stops]


def test_front_ends_where_one_tensor_carries_everything():
    stops, after = find_front(make_branches())
    names = names_of(stops)
    assert names[-1] == "pool"
    assert names[1:] == ["conv", "add", "pool"]
    assert after == "head_norm"
    model = make_branches()
    model.get_layer("side").trainable = True
    stops, after = find_front(model)
    assert names_of(stops)[-1] == "conv"
    assert after == "side"


@pytest.mark.parametrize("inner", [layers.Dense(3), layers.Dropout(0.5)])
def test_front_ends_before_a_model_of_which_a_part_is_not_fixed(inner):
    base = keras.Sequential([layers.Dense(3), layers.Activation("relu"), inner])
    base.layers[0].trainable = False
    inputs = keras.Input((3,))
    outputs = layers.Dense(2)(base(layers.Dense(3, name="before", trainable=False)(inputs)))
    stops, after = find_front(keras.Model(inputs, outputs))
    assert names_of(stops)[-1] == "before"
    assert after == base.name


def test_nothing_to_train(tmp_path):
    """All is frozen: there is still something to predict with."""
    model = make_plain()
    model.trainable = False
    fast = FrozenOnce(model, tmp_path)
    expected = model.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(fast.predict(IMAGES, verbose=0), expected, atol=1e-6)


class Custom(keras.Model):
    def train_step(self, data):
        return {}


def make_two_inputs():
    one, two = keras.Input((3,)), keras.Input((3,))
    return keras.Model([one, two], layers.Add()([one, two]))


def make_two_outputs():
    inputs = keras.Input((3,))
    return keras.Model(inputs, [inputs, layers.Dense(2)(inputs)])


class Subclassed(keras.Model):
    def call(self, x):
        return x


def make_any_size():
    inputs = keras.Input((None, None, 3))
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(inputs))


def make_own_step():
    inputs = keras.Input((3,))
    return Custom(inputs, layers.Dense(2)(inputs))


@pytest.mark.parametrize(
    "make", [make_two_inputs, make_two_outputs, make_own_step, make_any_size, Subclassed]
)
def test_what_it_cannot_do_is_one_sentence(make, tmp_path):
    with pytest.raises(
        transfer_vgg16.Failure, match="one input of fixed size, one output .* own fit"
    ):
        FrozenOnce(make(), tmp_path)


def test_statistics_that_are_one_number(tmp_path):
    """Normalization's, which are no part of its configuration."""
    norm = layers.Normalization(axis=None)
    model, outputs = compile_it(make_plain(norm)), []
    fast = FrozenOnce(model, tmp_path)
    for images in (IMAGES, IMAGES // 2):
        norm.adapt(images)
        compile_it(model)  # else Keras's own predict() goes on with the former ones
        outputs.append(fast.predict(IMAGES, verbose=0))
        np.testing.assert_allclose(outputs[-1], model.predict(IMAGES, verbose=0), atol=1e-5)
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_room_for_what_is_missing_is_enough(tmp_path, monkeypatch):
    """A pass was broken off after 9,000 of 12,288 bytes: 4,000 are enough to go on, 2,000 not."""
    model = compile_it(make_plain())
    FrozenOnce(model, tmp_path).predict(IMAGES, verbose=0)
    (whole,) = tmp_path.glob("*.features")
    part = tmp_path / f"{transfer_vgg16.PARTIAL}99999999-{whole.name}"
    part.write_bytes(whole.read_bytes()[:9000])
    whole.unlink()
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=2000))
    with pytest.raises(transfer_vgg16.Failure, match="need 0.0 GB on the disk"):
        FrozenOnce(model, tmp_path).predict(IMAGES, verbose=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=4000))
    FrozenOnce(model, tmp_path).predict(IMAGES, verbose=0)
    assert whole.exists()
    assert not part.exists()


def test_outputs_of_a_layer_whose_name_ends_alike_stay(tmp_path):
    other = tmp_path / "my_second-0123456789ab.features"
    former = tmp_path / "second-0123456789ab.features"
    for path in (other, former):
        path.touch()
    FrozenOnce(compile_it(make_plain()), tmp_path).predict(IMAGES, verbose=0)
    assert other.exists()
    assert not former.exists()


def test_more_images_than_labels_are_one_sentence(tmp_path):
    """As Keras refuses them: else, each image would get another one's label."""
    fast = FrozenOnce(compile_it(make_plain()), tmp_path)
    with pytest.raises(transfer_vgg16.Failure, match="48 images and 47 sample weights: give"):
        fast.fit(IMAGES, LABELS, sample_weight=np.ones(COUNT - 1), verbose=0)
    for images, labels in ((IMAGES[5:], LABELS), (IMAGES, LABELS[5:])):
        with pytest.raises(transfer_vgg16.Failure, match="images and .* labels: give"):
            fast.fit(images, labels, verbose=0)
        with pytest.raises(transfer_vgg16.Failure, match="images and .* labels: give"):
            fast.evaluate(images, labels, verbose=0)


def test_stop_that_is_no_layer_is_one_sentence(tmp_path):
    """As with --unfreeze, after main() was edited for another base."""
    with pytest.raises(
        transfer_vgg16.Failure, match="the model has no layer block4_pool \\(No suc"
    ):
        FrozenOnce(make_plain(), tmp_path, stop="block4_pool")


def test_not_compiled_is_keras_s_error(tmp_path):
    with pytest.raises(ValueError, match="compile"):
        FrozenOnce(make_plain(), tmp_path).fit(IMAGES, LABELS, verbose=0)


# ----- callbacks


def test_callbacks_see_the_whole_model(tmp_path):
    """What they save is the whole model, and EarlyStopping stops the training."""
    model = compile_it(make_plain())
    fast = FrozenOnce(model, tmp_path)
    seen = []
    callbacks = [
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", save_best_only=True),
        keras.callbacks.EarlyStopping("loss", baseline=0, patience=2),
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.01 / (epoch + 1)),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs)),
        given := keras.callbacks.History(),
    ]
    history = fast.fit(
        IMAGES,
        LABELS,
        epochs=9,
        validation_data=(X_VAL, Y_VAL),
        callbacks=callbacks,
        verbose=0,
    )
    assert history is given is model.history
    assert history.epoch == [0, 1]
    assert [one["val_loss"] for one in seen] == history.history["val_loss"]
    assert float(model.optimizer.learning_rate) == pytest.approx(0.005)
    saved = keras.models.load_model(tmp_path / "best.keras")
    assert [layer.name for layer in saved.layers] == [layer.name for layer in model.layers]
    best = saved.evaluate(X_VAL, Y_VAL, verbose=0)
    assert best[0] == pytest.approx(min(history.history["val_loss"]), abs=1e-5)


def test_callback_that_goes_on_where_a_run_stopped(tmp_path):
    """BackupAndRestore, of a run that was broken off in its fourth epoch."""

    def interrupt(epoch, logs):
        if epoch == 3:
            raise KeyboardInterrupt

    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    stop = keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)
    with pytest.raises(KeyboardInterrupt):
        FrozenOnce(compile_it(make_plain()), tmp_path).fit(
            IMAGES, LABELS, epochs=5, callbacks=[backup, stop], verbose=0
        )
    history = FrozenOnce(compile_it(make_plain()), tmp_path).fit(
        IMAGES, LABELS, epochs=5, callbacks=[backup], verbose=0
    )
    assert history.epoch == [3, 4]


def test_callback_that_stops_within_an_epoch(tmp_path):
    model = compile_it(make_plain(), 1e30)
    callback = keras.callbacks.TerminateOnNaN()
    history = FrozenOnce(model, tmp_path).fit(
        IMAGES, LABELS, epochs=5, callbacks=callback, verbose=0
    )
    assert len(history.epoch) == 1


# ----- mirror images


def test_mirror_images_are_averaged_in_predict_only(tmp_path):
    model = compile_it(make_plain())
    fast = FrozenOnce(model, tmp_path, mirror=True)
    mirrored = IMAGES[:, :, ::-1]
    plain = model.predict(IMAGES, verbose=0)
    mean = (plain + model.predict(mirrored, verbose=0)) / 2
    assert np.abs(plain - mean).max() > 1e-3
    np.testing.assert_allclose(fast.predict(IMAGES, verbose=0), mean, atol=1e-6)
    np.testing.assert_allclose(fast.predict(IMAGES[:3], verbose=0), mean[:3], atol=1e-6)
    expected = model.evaluate(IMAGES, LABELS, verbose=0)
    assert fast.evaluate(IMAGES, LABELS, verbose=0) == pytest.approx(expected, abs=1e-5)


def test_training_takes_images_or_mirror_images(tmp_path, monkeypatch):
    """With the frozen layers run once, the numbers are those with all of them run each time."""
    results = []
    for at_once in (False, True):
        if not at_once:  # only the input carries everything
            monkeypatch.setattr(
                transfer_vgg16, "find_front", lambda model: (model.inputs, "the first layer")
            )
        model = compile_it(make_plain())
        np.random.seed(0)
        history = FrozenOnce(model, tmp_path, mirror=True).fit(
            IMAGES, LABELS, epochs=3, validation_data=(X_VAL, Y_VAL), verbose=0
        )
        results.append((model, history))
        monkeypatch.undo()
    check_same(results, 1e-5)
    (plain, _) = train_both(make_plain, tmp_path)[0]
    assert np.abs(plain.get_weights()[-2] - model.get_weights()[-2]).max() > 1e-3


def test_rows_are_taken_from_either_view():
    """Each epoch anew, about half of them from either, with the right labels."""
    keras.utils.set_random_seed(0)
    rows = np.arange(1000)[:, None]
    with transfer_vgg16.contextlib.ExitStack() as let_go:
        views = [rows, rows + 1000]
        data = transfer_vgg16.batches(let_go, views, rows, None, 64, shuffle=True)
        epochs = []
        for _ in range(2):
            taken, labels = (np.concatenate(parts)[:, 0] for parts in zip(*data, strict=True))
            assert np.array_equal(taken % 1000, labels)
            assert np.array_equal(np.sort(labels), rows[:, 0])
            epochs.append(np.sort(labels[taken >= 1000]))
            assert 400 < len(epochs[-1]) < 600
    assert not np.array_equal(*epochs)


# ----- what is kept, and when it is used again


def predict(model, directory, images=IMAGES):
    """Return what FrozenOnce predicts, checked against Keras, and the files in `directory`."""
    preds = FrozenOnce(model, directory).predict(images, verbose=0)
    np.testing.assert_allclose(preds, model.predict(images, verbose=0), atol=1e-6)
    return sorted(path.name for path in directory.glob("*.features"))


@pytest.fixture
def passes(monkeypatch):
    """A list of the files that were written, which a pass over the images each did."""
    written, write = [], transfer_vgg16.write_outputs

    def count(model, x, key, path, verbose):
        written.append(path.name)
        write(model, x, key, path, verbose)

    monkeypatch.setattr(transfer_vgg16, "write_outputs", count)
    return written


def test_outputs_are_found_again_by_content(passes, tmp_path):
    """By a model made anew, whose layers Keras calls otherwise, and from a copy of the images."""
    (first,) = predict(make_plain(), tmp_path)
    again = make_plain()
    assert predict(again, tmp_path, IMAGES.copy()) == [first]
    assert passes == [first]


def change_weight(model):
    values = model.get_layer("first").get_weights()
    values[1][0] += 1
    model.get_layer("first").set_weights(values)
    return model


def change_value(images):
    images[7, 1, 2, 0] ^= 1
    return images


CHANGES = {
    "weight": lambda: (change_weight(make_plain()), IMAGES),
    "one value of one image": lambda: (make_plain(), change_value(IMAGES.copy())),
    "order": lambda: (make_plain(), IMAGES[::-1]),
    "number": lambda: (make_plain(), IMAGES[:40]),
    "dtype": lambda: (make_plain(), IMAGES.astype("float32")),
    "layer before": lambda: (make_plain(layers.Rescaling(0.5)), IMAGES),
    "setting of it": lambda: (make_plain(layers.Rescaling(0.25)), IMAGES),
}


def make_activated(function):
    """A model whose first layer has the name of an activation."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIDE, SIDE, 3))
    x = layers.Conv2D(2, 3, activation=function, name="relu")(inputs)
    x = layers.Dense(2)(layers.Flatten()(x))
    return freeze(keras.Model(inputs, x), "relu")


def own_activation(x):
    return keras.ops.tanh(x)


@pytest.mark.parametrize("functions", [("relu", "tanh"), (own_activation, own_activation)])
def test_other_activation_is_never_served(functions, passes, tmp_path):
    """Not where a name is the function's, nor where code of its own may have changed."""
    for function in functions:
        FrozenOnce(make_activated(function), tmp_path).predict(IMAGES, verbose=0)
    assert len(set(passes)) == 2


@pytest.mark.parametrize("change", CHANGES)
def test_other_content_is_never_served(change, passes, tmp_path):
    model, images = CHANGES[change]()
    before = predict(make_plain(), tmp_path)
    after = predict(model, tmp_path, images)
    assert len(passes) == 2
    assert len(after) == 1  # nothing piles up
    assert after != before


def test_precision_counts(passes, tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = make_plain()
    finally:
        keras.config.set_dtype_policy("float32")
    predict(make_plain(), tmp_path)
    FrozenOnce(model, tmp_path).predict(IMAGES, verbose=0)
    assert len(set(passes)) == 2


class Own(layers.Layer):
    factor = 1.0

    def call(self, x):
        return x * self.factor


def test_code_that_may_have_changed_is_not_trusted(passes, tmp_path):
    predict(make_plain(Own()), tmp_path)
    Own.factor = 2.0
    try:
        predict(make_plain(Own()), tmp_path)
    finally:
        Own.factor = 1.0
    assert len(set(passes)) == 2


def truncate(content):
    return content[:-1000]


def cut_the_key(content):
    return content[:-1]


def lengthen(content):
    return content + bytes(32)


def damage_the_key(content):
    return content[:-32] + bytes(32)


def empty(content):
    return b""


@pytest.mark.parametrize("harm", [truncate, cut_the_key, lengthen, damage_the_key, empty])
def test_file_that_is_not_whole_is_made_again(harm, passes, tmp_path):
    (name,) = predict(make_plain(), tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(harm(whole))
    assert predict(make_plain(), tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == whole
    assert passes == [name] * 2


def test_other_files_stay(tmp_path):
    """Those of other layers, of a run that is still going, and of nobody knows whom."""
    running = f"{transfer_vgg16.PARTIAL}{os.getpid()}-second-000000000000.features"
    for name in (
        "block5_pool-0123.features",
        "second.txt",
        running,
        "part-x-1-second-1.features",
    ):
        (tmp_path / name).touch()
    (tmp_path / "second-0123.features").touch()
    predict(make_plain(), tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert "second-0123.features" not in left
    assert left > {
        "block5_pool-0123.features",
        "second.txt",
        running,
        "part-x-1-second-1.features",
    }


def test_few_images_are_not_worth_a_file(tmp_path):
    assert predict(make_plain(), tmp_path, IMAGES[:32]) == []


@pytest.mark.parametrize("whose", ["this process's", "a killed one's"])
def test_pass_that_is_broken_off_goes_on(whose, tmp_path, monkeypatch):
    """After Ctrl-C in a notebook, or a kill: the same bytes, without what was done."""
    monkeypatch.setattr(transfer_vgg16, "images_at_once", lambda model: 10)
    (name,) = predict(make_plain(), tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    add, done = keras.utils.Progbar.add, []

    def interrupt(self, count):
        done.append(count)
        if sum(done) == 30 and whose:
            raise KeyboardInterrupt
        add(self, count)

    monkeypatch.setattr(keras.utils.Progbar, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        FrozenOnce(make_plain(), tmp_path).predict(IMAGES, verbose=0)
    (part,) = tmp_path.iterdir()
    assert part.name == f"{transfer_vgg16.PARTIAL}{os.getpid()}-{name}"
    if whose == "a killed one's":
        part.rename(tmp_path / f"{transfer_vgg16.PARTIAL}999999999-{name}")
        with next(tmp_path.iterdir()).open("ab") as file:
            file.write(b"half a row")
    whose, done[:] = None, []
    predict(make_plain(), tmp_path)
    assert done[0] == 30
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == whole


def test_longest_of_two_broken_passes_goes_on(tmp_path, monkeypatch):
    """This process's own, of 40 images, not a killed one's of 10."""
    monkeypatch.setattr(transfer_vgg16, "images_at_once", lambda model: 10)
    (name,) = predict(make_plain(), tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    row = (len(whole) - 32) // COUNT
    for process, count in ((os.getpid(), 40), (999999999, 10)):
        part = tmp_path / f"{transfer_vgg16.PARTIAL}{process}-{name}"
        part.write_bytes(whole[: count * row])
    done, add = [], keras.utils.Progbar.add
    monkeypatch.setattr(keras.utils.Progbar, "add", lambda *a: (done.append(a[1]), add(*a)))
    predict(make_plain(), tmp_path)
    assert done[0] == 40
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == whole


def test_nested_base_counts_for_the_memory():
    """As many images at once as when its layers stand in the model."""
    inputs = keras.Input((64, 64, 3))
    base = keras.applications.VGG16(include_top=False, weights=None, input_shape=(64, 64, 3))
    nested = keras.Model(inputs, base(inputs))
    assert transfer_vgg16.images_at_once(nested) == transfer_vgg16.images_at_once(base) == 62


def test_disk_without_room(tmp_path, monkeypatch):
    usage = transfer_vgg16.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(transfer_vgg16.shutil, "disk_usage", lambda path: usage)
    sentence = rf"of second need 0.0 GB on the disk, and only 0.0 are free in {tmp_path}: .+"
    with pytest.raises(transfer_vgg16.Failure, match=sentence):
        FrozenOnce(make_plain(), tmp_path).predict(IMAGES, verbose=0)
    assert list(tmp_path.iterdir()) == []


def test_directory_is_made_or_one_sentence_says_why_not(tmp_path):
    assert len(predict(make_plain(), tmp_path / "new" / "one")) == 1
    (tmp_path / "file").touch()
    with pytest.raises(transfer_vgg16.Failure, match="nothing can be written into"):
        FrozenOnce(make_plain(), tmp_path / "file")


@pytest.mark.skipif(
    not os.path.exists("/proc/self/maps"), reason="only Linux tells what is mapped"
)
def test_outputs_are_let_go(tmp_path):
    """So that Windows lets another run delete their files."""
    model = compile_it(make_plain())
    fast = FrozenOnce(model, tmp_path)
    fast.fit(IMAGES, LABELS, validation_data=(X_VAL, Y_VAL), verbose=0)
    fast.evaluate(IMAGES, LABELS, verbose=0)
    fast.predict(IMAGES, verbose=0)
    assert not re.findall(rf"{tmp_path}.*features", Path("/proc/self/maps").read_text())


# ----- where the outputs are


def test_without_a_directory_outputs_are_in_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = compile_it(make_plain())
    fast = FrozenOnce(model)
    expected = model.predict(IMAGES, verbose=0)
    for _ in range(2):
        np.testing.assert_allclose(fast.predict(IMAGES, verbose=2), expected, atol=1e-6)
    line = r"^The layers up to second run over 48 images:$"  # which names no file to delete
    assert len(re.findall(line, capsys.readouterr().out, re.M)) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_a_directory_large_outputs_are_not_kept(monkeypatch, capsys):
    monkeypatch.setattr(transfer_vgg16, "count_bytes", lambda tensor: 100_001)
    model = compile_it(make_plain())
    fast = FrozenOnce(model)
    expected = model.evaluate(IMAGES, LABELS, verbose=0)
    assert fast.evaluate(IMAGES, LABELS, verbose=0) == pytest.approx(expected, abs=1e-5)
    assert fast.memory == {}
    FrozenOnce(model).fit(IMAGES, LABELS, verbose=2)
    assert "in every epoch: give a directory, as the outputs are large" in capsys.readouterr().out


def test_drive_that_cannot_map_files(tmp_path, monkeypatch, capsys):
    """As some that are mounted over a network, Colab's among them."""

    def refuse(*_, **__):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(np, "memmap", refuse)
    check_same(train_both(make_plain, tmp_path))
    FrozenOnce(compile_it(make_plain()), tmp_path).fit(IMAGES, LABELS, verbose=2)
    assert (
        "is read into memory, as it cannot be mapped (No such device)" in capsys.readouterr().out
    )
