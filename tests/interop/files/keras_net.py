"""Make keras_net.keras, .h5 and .safetensors: a model of Keras, and what it gives.

Run with Keras 3, h5py and JAX: KERAS_BACKEND=jax python tests/interop/files/keras_net.py
"""

from pathlib import Path

import keras
import numpy as np
from keras import layers
from safetensors.numpy import save_file

HERE = Path(__file__).with_suffix("")
image, ids = keras.Input((6, 6, 2), name="image"), keras.Input((2,), name="ids")
x = layers.Conv2D(4, 3, strides=2, padding="same", name="conv")(image)
x = layers.BatchNormalization(name="norm")(x)
x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="depth")(x)
x = layers.GroupNormalization(2, name="groups")(x)
x = layers.Conv2DTranspose(3, 2, strides=2, name="up")(x)
inner = [layers.Conv2D(2, 1, name="mix"), layers.BatchNormalization(scale=False, name="shift")]
x = layers.Flatten()(keras.Sequential(inner, name="inner")(x))
x = layers.Reshape((2, 4))(layers.Dense(8, activation="tanh", name="hidden")(x))
x = layers.Add()([x, layers.Embedding(5, 4, name="embed")(ids)])
x = layers.LayerNormalization(name="layer")(x)
x = layers.MultiHeadAttention(2, 2, name="attention")(x, x)
x = layers.Dense(3, use_bias=False, name="logits")(
    layers.Dropout(0.5, name="drop")(layers.Flatten()(x))
)
net = keras.Model([image, ids], x, name="net")

rng = np.random.default_rng(0)
for variable in net.trainable_variables + [
    v for v in net.non_trainable_variables if "mov" in v.path
]:
    variable.assign(np.abs(rng.normal(size=variable.shape)) / 3 + 0.1)
net.save(HERE.with_suffix(".keras"))
net.save(HERE.with_suffix(".h5"))

inputs = [rng.normal(size=(4, 6, 6, 2)).astype("float32"), rng.integers(0, 5, (4, 2))]
net.get_layer("drop").rate = 0.0
net.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
labels, evaluated = np.arange(4) % 3, np.array(net(inputs))
trained = [float(net.train_on_batch(inputs, labels)) for _ in range(3)]
found = {"image": inputs[0], "ids": inputs[1], "labels": labels, "evaluated": evaluated}
save_file({**found, "losses": np.array(trained)}, HERE.with_suffix(".safetensors"))
