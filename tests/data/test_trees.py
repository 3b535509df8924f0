"""Examples with several parts: x and y are trees, and a model gets the tree x as its one argument.

The oracle is a torch module with two inputs, trained by torch on the rows that count.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fdl
from fdl import TrainState, data, interop, losses, metrics, nn, optim, parallel, random, tree
from tests.support.asserts import close, draw

N, WORDS, LENGTH = 14, 7, 5
TOKENS = random.randint(random.key(0), (N, LENGTH), 0, WORDS)
COUNTS = torch.arange(LENGTH) <= random.randint(random.key(1), (N, 1), 0, LENGTH)
NUMBERS = draw(2, N, 2)
Y = {"class": random.randint(random.key(3), (N,), 0, 3), "value": draw(4, N, 1)}


class Twin(torch.nn.Module):
    """The mean of the words that count, beside two numbers; two heads."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(WORDS, 4)
        self.norm = torch.nn.BatchNorm1d(6) if norm else torch.nn.Identity()
        self.heads = torch.nn.Linear(6, 4)

    def forward(self, tokens: Tensor, counts: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        means = (self.words(tokens) * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)
        y = self.heads(self.norm(torch.cat([means, numbers], 1)))
        return y[:, :3], y[:, 3:]


def network(norm: bool = False) -> Any:
    words = nn.embedding(WORDS, 4)

    def pooled(params: Any, x: Any, *, train: bool = False, key: Any = None) -> Tensor:
        tokens, counts, numbers = x["text"]["tokens"], x["text"]["counts"], x["numbers"]
        features = words.apply(params, tokens) * counts[..., None]
        return torch.cat([features.sum(1) / counts.sum(1, keepdim=True), numbers], 1)

    layers = {"words": nn.Model(words.init, pooled, uses_key=False)}
    if norm:
        layers["norm"] = nn.batch_norm(6)
    heads = {"heads": nn.linear(6, 4), "cut": lambda y: (y[:, :3], y[:, 3:])}
    return nn.sequential(**layers, **heads)


def examples() -> data.Dataset:
    return data.Dataset({"text": {"tokens": TOKENS, "counts": COUNTS}, "numbers": NUMBERS}, Y)


def both(prediction: tuple[Tensor, Tensor], y: dict[str, Tensor], weights: Any = None) -> Tensor:
    logits, value = prediction
    return losses.cross_entropy(logits, y["class"], weights) + losses.mse(
        value, y["value"], weights
    )


def accuracy(prediction: Any, y: Any, weights: Any = None) -> metrics.Mean:
    return metrics.accuracy(prediction[0], y["class"], weights)


def setting(norm: bool) -> tuple[Any, TrainState, Any, Twin]:
    model, opt = network(norm), optim.sgd(0.1, momentum=0.9)
    loss = fdl.supervised(model, both, {"accuracy": accuracy})
    state = TrainState.create(model, opt, key=random.key(5))
    params = tree.cast(state.params, torch.float64)
    state = TrainState.create(model, opt, key=random.key(5), params=params)
    state = state._replace(buffers=tree.cast(state.buffers, torch.float64))
    twin = Twin(norm).double()
    twin.load_state_dict(tree.flatten_dict(params), strict=False)
    return fdl.train_step(loss, opt), state, fdl.eval_step(loss), twin


def train_twin(twin: Twin, opt: torch.optim.Optimizer, indices: data.Indices) -> None:
    for index, mask in zip(*indices, strict=True):
        rows = index[mask] if len(mask) else index
        opt.zero_grad()
        logits, value = twin(TOKENS[rows], COUNTS[rows], NUMBERS[rows])
        loss = F.cross_entropy(logits, Y["class"][rows]) + F.mse_loss(value, Y["value"][rows])
        loss.backward()
        opt.step()


@pytest.mark.parametrize("norm", [False, True], ids=["without buffers", "with buffers"])
@pytest.mark.parametrize("batch_size", [4, 7], ids=["padded", "whole"])
def test_training_on_several_inputs_and_targets_equals_the_twin(norm, batch_size) -> None:
    step, state, evaluate, twin = setting(norm)
    points, start = examples(), state.params
    opt = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(3):
        indices = data.epoch_indices(random.key(epoch), N, batch_size)
        for batch in data.batches(points, indices):
            state, _ = step(state, batch)
        train_twin(twin, opt, indices)
    moved = tree.map(torch.sub, state.params, start)
    assert all(leaf.abs().max() > 1e-3 for leaf in tree.leaves(moved))
    ours = tree.flatten_dict(state.params) | tree.flatten_dict(state.buffers)
    close(ours, dict(twin.state_dict()))
    found = [
        evaluate(state, batch) for batch in data.batches(points, data.sequential_indices(N, 4))
    ]
    logits, _ = twin.eval()(TOKENS, COUNTS, NUMBERS)
    right = (logits.argmax(1) == Y["class"]).double().mean()
    close(sum(each["accuracy"] for each in found).value, right)


@pytest.mark.slow
def test_an_epoch_of_trees_compiled_and_for_members(plain_backend) -> None:
    step, state, _, _ = setting(norm=True)
    points, indices = examples(), data.epoch_indices(random.key(0), N, 4)

    def epoch(state: TrainState, points: data.Dataset, rows: data.Indices) -> Any:
        return fdl.scan(lambda s, row: step(s, data.batch(points, row)), state, rows)

    eager = epoch(state, points, indices)
    close(fdl.jit(epoch)(state, points, indices), eager)
    states = tree.stack([state, tree.map(lambda leaf: leaf.clone(), state)])
    members = fdl.jit(torch.vmap(epoch, (0, None, None)))(states, points, indices)
    for i in range(2):
        close(tree.map(lambda leaf, i=i: leaf[i], members), eager)


@pytest.mark.parametrize("container", [tuple, list, dict])
def test_rows_of_trees_are_rows_of_each_leaf(container) -> None:
    parts = {"a": draw(0, 6, 2), "b": torch.arange(6), "c": torch.arange(6) > 2}
    x = parts if container is dict else container(parts.values())
    row = data.Indices(torch.tensor([3, 5, 0]), torch.tensor([True, True, False]))
    for y in (parts["b"], (), {"left": parts["b"], "right": [parts["a"]]}):
        batch = data.batch(data.Dataset(x, y), row)
        assert type(batch.x) is container and torch.equal(batch.mask, row.mask)
        for got, whole in zip(tree.leaves((batch.x, batch.y)), tree.leaves((x, y)), strict=True):
            assert torch.equal(got, whole[[3, 5, 0]]) and got.dtype == whole.dtype
        first, second = data.split(random.key(1), data.Dataset(x, y), 0.5)
        assert type(first.x) is type(second.x) is container
        order = random.permutation(random.key(1), 6)
        for part, rows in ((second, order[:3]), (first, order[3:])):
            for got, whole in zip(tree.leaves(part), tree.leaves((x, y)), strict=True):
                assert torch.equal(got, whole[rows])


def test_to_float_converts_the_images_of_a_tree() -> None:
    images = random.randint(random.key(0), (4, 3, 3), 0, 256).to(torch.uint8)
    x = {
        "images": [images, images[:, None]],
        "tokens": torch.arange(4),
        "mask": images[:, 0, 0] > 9,
    }
    for kind in (data.Batch, data.Dataset):
        found = data.to_float(kind(x, images))
        assert type(found) is kind and found.y is images and list(found.x) == list(x)
        for image in found.x["images"]:
            close(image, images[:, None] / 255, rtol=0, atol=0)
        assert found.x["tokens"] is x["tokens"] and found.x["mask"] is x["mask"]


@pytest.mark.parametrize(
    ("x", "y", "kind", "message"),
    [
        (
            (torch.ones(3), torch.ones(4)),
            torch.ones(3),
            ValueError,
            r"{'x.0': 3, 'x.1': 4, 'y': 3}",
        ),
        (torch.ones(3), {"a": torch.ones(2)}, ValueError, r"{'x': 3, 'y.a': 2}"),
        ({"a": torch.ones(3), "b": 2.0}, torch.ones(3), TypeError, r"\n  x.b: 2.0 \(float\)"),
        ({"a": torch.ones(3), "b": None}, torch.ones(3), TypeError, r"\n  x.b: None"),
        (
            {"a": torch.tensor(1)},
            torch.ones(3),
            TypeError,
            r"\n  x.a: a tensor, int64 of shape \(\)",
        ),
        ((), (), ValueError, "got no tensor"),
        ([torch.ones(2, device="meta")], torch.ones(2), ValueError, "x.0 on meta, y on cpu, index"),
    ],
)
def test_batch_names_the_paths_that_do_not_fit(x, y, kind, message) -> None:
    with pytest.raises(kind, match=f"batch: (?s:.*){message}"):
        data.batch(data.Dataset(x, y), torch.tensor([0]))


def test_microbatches_cut_trees() -> None:
    _, state, _, _ = setting(norm=False)
    loss, opt = fdl.supervised(network(), both), optim.sgd(0.1, momentum=0.9)
    rows = data.Indices(torch.arange(8).view(1, 8), torch.arange(8).view(1, 8) < 7)
    (batch,) = data.batches(examples(), parallel.own_rows(rows, None))
    expected, _ = fdl.train_step(loss, opt)(state, batch)
    found, _ = parallel.train_step(loss, opt, None, microbatches=4)(state, batch)
    close(found.params, expected.params)


def test_a_module_with_several_inputs_gets_the_parts_of_the_tree() -> None:
    """As the page on modules says."""
    twin = Twin().double()
    model, params, _ = interop.from_module(twin)
    model = model._replace(apply=lambda params, x, **options: model_apply(params, *x, **options))
    model_apply = interop.from_module(twin)[0].apply
    batch = data.batch(data.Dataset((TOKENS, COUNTS, NUMBERS), Y), torch.arange(5))
    close(model.apply(params, batch.x), twin(TOKENS[:5], COUNTS[:5], NUMBERS[:5]))
    value, _ = fdl.supervised(model, both)(params, batch)
    close(value, both(twin(TOKENS[:5], COUNTS[:5], NUMBERS[:5]), tree.map(lambda y: y[:5], Y)))


def test_statistics_are_recomputed_from_trees() -> None:
    _, state, _, twin = setting(norm=True)
    model = network(norm=True)
    rows = torch.arange(12).view(3, 4)
    buffers = fdl.update_bn(model, state.params, state.buffers, examples(), rows)

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twin = twin

        def forward(self, row: Tensor) -> Any:
            return self.twin(TOKENS[row], COUNTS[row], NUMBERS[row])

    torch.optim.swa_utils.update_bn(list(rows), Whole())
    close(buffers["norm"], dict(twin.norm.named_buffers()))
