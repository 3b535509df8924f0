"""Write the training of LeNet as files, from which docs/examples/lenet_train.cpp trains it.

python docs/examples/lenet_export.py FOLDER

- init.pt2: key → state
- epoch.pt2: state, images, labels → state, loss, accuracy
- images, labels: a tenth of Fashion-MNIST, one byte for each pixel and label
"""

import sys
from pathlib import Path

import fdl
from fdl import data, losses, metrics, optim, random
from models import lenet

model, opt = lenet(), optim.adam(1e-2)
loss = fdl.supervised(model, losses.cross_entropy, {"accuracy": metrics.accuracy})
step = fdl.train_step(loss, opt)
order = random.key(1)  # closed over: it becomes part of the file


def init(key):
    """Draw the parameters."""
    return fdl.TrainState.create(model, opt, key=key)


def epoch(state, images, labels):
    """Train for an epoch, in an order of its own."""
    examples = data.Dataset(images, labels.long())
    rows = data.epoch_indices(random.fold_in(order, state.step), len(images), batch_size=256)
    state, means = fdl.scan(
        lambda state, row: step(state, data.to_float(data.batch(examples, row))), state, rows
    )
    return state, means["loss"].sum().value, means["accuracy"].sum().value


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    images, labels = data.fashion_mnist_sample()
    labels = labels.byte()
    key = random.key(0)
    fdl.export(init, (key,), folder / "init.pt2")
    fdl.export(epoch, (init(key), images, labels), folder / "epoch.pt2")
    (folder / "images").write_bytes(images.numpy().tobytes())
    (folder / "labels").write_bytes(labels.numpy().tobytes())
