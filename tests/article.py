"""The article's program as it stands there, in plain Keras: what the tests compare against.

    python tests/article.py DATA.npz WEIGHTS.h5 [EPOCHS]

Only what makes it comparable is added: local inputs, a seed, and history.csv. Its two figures and
the drawing of the model are left out. It writes into the current directory.
"""

import sys

import keras
import numpy as np
from keras import layers

data, weights = sys.argv[1:3]
epochs = int(sys.argv[3]) if len(sys.argv) > 3 else 10
keras.utils.set_random_seed(0)

with np.load(data) as file:
    x_train, y_train = file["x_train"], file["y_train"]
    x_test, y_test = file["x_test"], file["y_test"]
split = int(x_train.shape[0] * 0.2)
x_train, x_val = x_train[split:], x_train[:split]
y_train, y_val = y_train[split:], y_train[:split]

base = keras.applications.VGG16(include_top=False, weights=weights, input_shape=(32, 32, 3))
x = layers.Flatten()(base.output)
x = layers.Dense(256, activation="relu")(x)
x = layers.Dropout(0.5)(x)
model = keras.Model(base.input, layers.Dense(10, activation="softmax")(x))
for layer in model.layers[:19]:
    layer.trainable = False
model.summary()

model.compile(
    optimizer=keras.optimizers.SGD(learning_rate=1e-4, momentum=0.9),
    loss="sparse_categorical_crossentropy",
    metrics=["accuracy"],
)
model.fit(
    x_train,
    y_train,
    epochs=epochs,
    batch_size=32,
    validation_data=(x_val, y_val),
    callbacks=[
        keras.callbacks.ModelCheckpoint("vgg16_cifar10.keras", save_best_only=True),
        keras.callbacks.CSVLogger("history.csv"),
    ],
    verbose=2,
)

print(model.evaluate(x_test, y_test, verbose=2))
preds = model.predict(x_test, verbose=2)
print(f"予測: {np.argmax(preds[0])}, 正解: {y_test[0]}")
