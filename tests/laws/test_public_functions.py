"""Proof 3: every public function works under grad, vmap and torch.compile, and all together.

A table of functions times a list of laws: a new function costs one row and inherits every law.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

import fdl
from fdl import data, interop, losses, metrics, nn, optim, population, random, transforms, tree
from fdl.optim import schedules
from fdl.testing import assert_trees_close
from tests.laws.rows import (
    Case,
    as_module,
    draw,
    elementwise,
    initializer,
    labelled,
    layer,
    layer_with_buffers,
    predictions,
    weights,
    with_keys,
)
from tests.laws.rows_data import DATA
from tests.laws.rows_optim import OPTIM, SCHEDULES
from tests.laws.rows_transforms import TRANSFORMATIONS

ROWS = 3  # of a batch for vmap


linear = nn.linear(3, 2)
elementwise_model = nn.Model(
    lambda key: {"scale": draw(key, 3)},
    lambda params, x, *, train=False, key=None: params["scale"] * x,
)
MIXED = nn.Policy(torch.float64, torch.float32, torch.float64)

TABLE: dict[str, dict[str, Case]] = {
    "fdl": {
        "associative_scan": Case(
            lambda x: fdl.associative_scan(torch.matmul, x, reverse=True),
            lambda key: (draw(key, 5, 2, 2),),
        ),
        "cond": Case(
            lambda x, y: fdl.cond(x[0] > 0, lambda x: (x * y).sin(), lambda x: x * 2, x),
            lambda key: (draw(key, 2), draw(random.fold_in(key, 1), 2)),
            grads=(0, 1),
        ),
        "fori_loop": Case(
            lambda x, y: fdl.fori_loop(0, 3, lambda i, x: x.sin() + i * y, x),
            lambda key: (draw(key, 2), draw(random.fold_in(key, 1), 2)),
            grads=(0, 1),
        ),
        "map": Case(
            lambda x, y: [
                fdl.map(lambda x: x.sin() * y, x),
                fdl.map(lambda x: x.sin() * y, x, batch_size=2),
            ],
            lambda key: (draw(key, 5, 2), draw(random.fold_in(key, 1), 2)),
            grads=(0, 1),
        ),
        "scan": Case(
            lambda x, y: fdl.scan(lambda c, x: (c + x.sin() * y, c * x), y, x),
            lambda key: (draw(key, 5, 2), draw(random.fold_in(key, 1), 2)),
            grads=(0, 1),
        ),
        "switch": Case(
            lambda x: fdl.switch((x[0] * 2).long(), [torch.sin, torch.cos, torch.square], x),
            lambda key: (draw(key, 2),),
        ),
    },
    "nn": {
        "with_policy": layer(nn.with_policy(elementwise_model, MIXED), 3),
        "adaptive_avg_pool1d": Case(nn.adaptive_avg_pool1d(3), lambda key: (draw(key, 2, 1, 5),)),
        "adaptive_avg_pool2d": Case(
            nn.adaptive_avg_pool2d((3, 2)), lambda key: (draw(key, 2, 1, 5, 4),)
        ),
        "adaptive_max_pool2d": Case(
            nn.adaptive_max_pool2d((3, 2)), lambda key: (draw(key, 2, 1, 5, 4),)
        ),
        "avg_pool1d": Case(nn.avg_pool1d(3, 2, 1), lambda key: (draw(key, 2, 1, 5),)),
        "avg_pool2d": Case(nn.avg_pool2d(2), lambda key: (draw(key, 2, 1, 4, 4),)),
        "batch_norm": layer_with_buffers(nn.batch_norm(3), 4, 3),
        "capture": layer(nn.capture(nn.sequential(linear, nn.tanh)), 4, 3),
        "concat": layer(nn.concat(linear, nn.tanh), 4, 3),
        "conv1d": layer(nn.conv1d(2, 4, 3, padding="same", dilation=2, groups=2), 2, 2, 5),
        "conv2d": layer(nn.conv2d(2, 4, 3, padding=1, stride=2, groups=2), 2, 2, 5, 5),
        "conv3d": layer(nn.conv3d(1, 2, 2, stride=(1, 2, 1), padding=(1, 0, 0)), 1, 1, 2, 4, 3),
        "conv_transpose1d": layer(
            nn.conv_transpose1d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2), 2, 2, 3
        ),
        "conv_transpose2d": layer(
            nn.conv_transpose2d(2, 1, (2, 3), stride=(2, 1), dilation=(1, 2)), 1, 2, 2, 2
        ),
        "dropout": with_keys(
            lambda key, x: nn.dropout(0.4).apply({}, x, train=True, key=key), (4, 5)
        ),
        "dropout2d": with_keys(
            lambda key, x: nn.dropout2d(0.4).apply({}, x, train=True, key=key), (2, 5, 2, 2)
        ),
        "embedding": Case(
            lambda params, x: nn.embedding(5, 3, padding_idx=1).apply(params, x),
            lambda key: ({"weight": draw(key, 5, 3)}, random.randint(key, (2, 4), 0, 5)),
        ),
        "flatten": Case(nn.flatten(), lambda key: (draw(key, 2, 3, 4),)),
        "gelu": elementwise(nn.gelu),
        "group_norm": layer(nn.group_norm(2, 4), 2, 4, 3),
        "gru": layer(nn.gru(2, 2, num_layers=2, bidirectional=True), 2, 3, 2),
        "gru_cell": layer(nn.gru_cell(3, 2), 2, 3),
        "instance_norm": layer(nn.instance_norm(2, affine=True), 2, 2, 4),
        "layer_norm": layer(nn.layer_norm(3), 2, 3),
        "leaky_relu": elementwise(nn.leaky_relu),
        "linear": layer(linear, 4, 3),
        "log_softmax": elementwise(lambda x: nn.log_softmax(x, -1)),
        "lstm": layer(nn.lstm(2, 2), 2, 3, 2),
        "lstm_cell": layer(nn.lstm_cell(3, 2), 2, 3),
        "max_pool1d": Case(nn.max_pool1d(3, 2, 1), lambda key: (draw(key, 2, 1, 5),)),
        "max_pool2d": Case(nn.max_pool2d(2), lambda key: (draw(key, 2, 1, 4, 4),)),
        "multihead_attention": Case(
            lambda params, query, memory, mask: nn.multihead_attention(4, 2).apply(
                params, (query, memory, memory, mask > -1)
            ),
            lambda key: (
                tree.cast(nn.multihead_attention(4, 2).init(key), torch.float64),
                *(draw(random.fold_in(key, i), 2, n, 4) for i, n in enumerate((2, 3))),
                draw(key, 2, 3),
            ),
            grads=(0, 1, 2),
        ),
        "parallel": layer(nn.sequential(nn.parallel(linear, nn.linear(3, 2)), sum), 4, 3),
        "rearrange": Case(
            nn.rearrange("b (h p) c -> b h (c p)", p=2), lambda key: (draw(key, 2, 4, 3),)
        ),
        "reduce": Case(nn.reduce("b (h 2) -> b h", "max"), lambda key: (draw(key, 2, 4),)),
        "relu": elementwise(nn.relu),
        "residual": layer(nn.residual(nn.sequential(nn.linear(3, 3), nn.tanh)), 4, 3),
        "rms_norm": layer(nn.rms_norm(3), 2, 3),
        "rnn": layer(nn.rnn(2, 2, num_layers=2), 2, 3, 2),
        "rnn_cell": layer(nn.rnn_cell(3, 2), 2, 3),
        "sequential": layer(nn.sequential(linear, nn.tanh, nn.linear(2, 2)), 4, 3),
        "sigmoid": elementwise(nn.sigmoid),
        "silu": elementwise(nn.silu),
        "softmax": elementwise(lambda x: nn.softmax(x, -1)),
        "softplus": elementwise(nn.softplus),
        "tanh": elementwise(nn.tanh),
        "tied": layer(
            nn.tied(nn.sequential(nn.linear(3, 3), nn.relu, nn.linear(3, 3)), {"2": "0"}), 4, 3
        ),
        "transformer_encoder_layer": layer(
            nn.transformer_encoder_layer(
                4, 2, dim_feedforward=3, activation=nn.gelu, dropout=0.0, causal=True
            ),
            *(2, 3, 4),
        ),
    },
    "nn.init": {
        "constant": initializer(nn.init.constant(3.0)),
        "kaiming_normal": initializer(nn.init.kaiming_normal()),
        "kaiming_uniform": initializer(nn.init.kaiming_uniform()),
        "normal": initializer(nn.init.normal(0.1)),
        "ones": initializer(nn.init.ones),
        "truncated_normal": initializer(nn.init.truncated_normal()),
        "uniform": initializer(nn.init.uniform(-1, 1)),
        "xavier_normal": initializer(nn.init.xavier_normal()),
        "xavier_uniform": initializer(nn.init.xavier_uniform()),
        "zeros": initializer(nn.init.zeros),
    },
    "losses": {
        "binary_cross_entropy_with_logits": Case(
            lambda x, y, w: losses.binary_cross_entropy_with_logits(
                x, y.sigmoid(), w, pos_weight=w[:3]
            ),
            predictions,
            grads=(0, 1, 2),
        ),
        "cosine_embedding": Case(
            lambda x, y, w: losses.cosine_embedding(x, y, torch.tensor([1, -1, 1, -1]), w),
            predictions,
            grads=(0, 1, 2),
        ),
        "cross_entropy": Case(
            lambda x, y, w: [
                losses.cross_entropy(x, y),
                losses.cross_entropy(x, y, w, label_smoothing=0.1),
                losses.cross_entropy(
                    x, y, label_smoothing=0.1, class_weights=x[0].exp(), ignore_index=2
                ),
                losses.cross_entropy(x, x.flip(1).softmax(1), w, class_weights=x[0].exp()),
            ],
            labelled,
        ),
        "huber": Case(
            lambda x, y, w: losses.huber(x, y, w, delta=0.7), predictions, grads=(0, 1, 2)
        ),
        "kl_div": Case(
            lambda x, y, w: [
                losses.kl_div(x.log_softmax(1), y.softmax(1), w),
                losses.kl_div(x.log_softmax(1), y.log_softmax(1), log_target=True),
            ],
            predictions,
            grads=(0, 1, 2),
        ),
        "l1": Case(
            lambda x, y, w: losses.l1(x, y + torch.tensor([5, -5, 5]), w),  # far from |0|
            predictions,
            grads=(0, 1, 2),
        ),
        "l2_penalty": Case(losses.l2_penalty, lambda key: (weights(key),)),
        "mse": Case(lambda x, y, w: losses.mse(x, y, w), predictions, grads=(0, 1, 2)),
        "nll": Case(
            lambda x, y, w: losses.nll(x, y, w, class_weights=x[0].exp(), ignore_index=2), labelled
        ),
        "smooth_l1": Case(
            lambda x, y, w: losses.smooth_l1(x, y, w, beta=0.7), predictions, grads=(0, 1, 2)
        ),
        "squared_loss": Case(lambda x, y, w: losses.squared_loss(x, y), predictions, grads=(0, 1)),
        "triplet_margin": Case(
            lambda x, y, w: [
                losses.triplet_margin(x, y, y.flip(0), w, margin=9.0, swap=True),
                losses.triplet_margin(x, y, y.flip(0), w, margin=9.0, p=3),
            ],
            predictions,
            grads=(0, 1, 2),
        ),
    },
    "metrics": {
        "Mean": Case(
            lambda x, y, w: (metrics.mean(x) + metrics.mean(y, w)).value, predictions, grads=(0, 1)
        ),
        "accuracy": Case(metrics.accuracy, labelled, grads=()),
        "calibration_error": Case(
            lambda x, y, w: (
                (metrics.calibration_error(x, y) + metrics.calibration_error(x, y, w)).value
            ),
            labelled,
        ),
        "confusion_matrix": Case(
            lambda x, y, w: (
                (metrics.confusion_matrix(x, y) + metrics.confusion_matrix(x, y, w)).value
            ),
            labelled,
            grads=(),
        ),
        "mean": Case(lambda x, y, w: metrics.mean(x, w), predictions, grads=(0, 2)),
        "per_batch": Case(metrics.per_batch(F.mse_loss), predictions, grads=(0, 1, 2)),
        "precision_recall_f1": Case(
            lambda x, y, w: [
                metrics.precision_recall_f1(x, y, w).value,
                metrics.precision_recall_f1(x, y).macro,
                (metrics.precision_recall_f1(x, y) + metrics.precision_recall_f1(x, y, w)).micro,
            ],
            labelled,
            grads=(),
        ),
        "top_k_accuracy": Case(
            lambda x, y, w: metrics.top_k_accuracy(x, y, w, k=2), labelled, grads=()
        ),
    },
    "debug": {
        "callback": Case(
            lambda x: (fdl.debug.callback(lambda x: None, x), x * 2)[1], lambda key: (draw(key, 3),)
        ),
        "print": Case(lambda x: (fdl.debug.print("{}", x), x * 2)[1], lambda key: (draw(key, 3),)),
    },
    "interop": {
        "as_module": as_module(nn.sequential(linear, nn.tanh), 4, 3),
        "from_flax": Case(
            lambda kernel: interop.from_flax({"kernel": kernel}, image=(3, 2, 2)),
            lambda key: (draw(key, 12, 5),),
        ),
        "from_module": layer_with_buffers(
            interop.from_module(
                torch.nn.Sequential(
                    torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.5)
                )
            )[0],
            *(4, 3),
        ),
        "to_flax": Case(
            lambda weight: interop.to_flax({"weight": weight}, kind="Conv"),
            lambda key: (draw(key, 2, 3, 4, 4),),
        ),
    },
    "optim": OPTIM,
    "optim.schedules": SCHEDULES,
    "random": {
        "bernoulli": Case(
            lambda key, x: random.bernoulli(key, torch.sigmoid(x)),
            lambda key: (key, draw(key, 5)),
            grads=(),
        ),
        "bits": with_keys(lambda key: random.bits(key, (5,))),
        "categorical": Case(
            lambda key, logits: random.categorical(key, logits),
            lambda key: (key, draw(key, 2, 3)),
            grads=(),
        ),
        "cauchy": with_keys(lambda key: random.cauchy(key, (3,), torch.float64)),
        "choice": with_keys(
            lambda key, x: (
                random.choice(key, x, (3,)),
                random.choice(key, x, (2,), False, x[:, 0].exp()),
            ),
            (4, 2),
        ),
        "exponential": with_keys(lambda key: random.exponential(key, (3,), torch.float64)),
        "fold_in": Case(
            random.fold_in, lambda key: (key, random.randint(key, (), 0, 100)), grads=()
        ),
        "gumbel": with_keys(lambda key: random.gumbel(key, (3,), torch.float64, "high")),
        "laplace": with_keys(lambda key: random.laplace(key, (3,), torch.float64)),
        "logistic": with_keys(lambda key: random.logistic(key, (3,), torch.float64)),
        "multivariate_normal": with_keys(
            lambda key, mean, root: random.multivariate_normal(
                key, mean, root @ root.mT + torch.eye(2)
            ),
            (2,),
            (2, 2),
        ),
        "normal": with_keys(lambda key, x: random.normal(key, (2, 3), torch.float64) * x, (3,)),
        "orthogonal": with_keys(lambda key: random.orthogonal(key, 2, (), torch.float64)),
        "permutation": with_keys(
            lambda key, x: (random.permutation(key, 7), random.permutation(key, x)), (4, 2)
        ),
        "rademacher": with_keys(lambda key: random.rademacher(key, (5,))),
        "randint": Case(
            lambda key, high: random.randint(key, (5,), 0, high),
            lambda key: (key, random.randint(key, (), 1, 100)),
            grads=(),
        ),
        "split": with_keys(lambda key: random.split(key, 3)),
        "truncated_normal": with_keys(
            lambda key, x: random.truncated_normal(key, x - 1, x + 1, dtype=torch.float64), (4,)
        ),
        "uniform": with_keys(
            lambda key, x: random.uniform(key, (2, 3), torch.float64, minval=x, maxval=x + 2), (3,)
        ),
    },
    "transforms": TRANSFORMATIONS,
    "data": DATA,
    "population": {
        "best": Case(population.best, lambda key: (draw(key, 4, 2), draw(key, 4))),
        "create": Case(
            lambda key, lr: population.create(
                linear, optim.sgd(0.1), random.split(key, 3), {"lr": lr}
            ),
            lambda key: (key, draw(key, 3)),
            grads=(1,),
        ),
        "ensemble": Case(
            lambda params, x: population.ensemble(linear, params, x),
            lambda key: (
                {"weight": draw(key, 4, 2, 3), "bias": draw(random.fold_in(key, 1), 4, 2)},
                draw(random.fold_in(key, 2), 5, 3),
            ),
            grads=(0, 1),
        ),
        "member": Case(
            population.member, lambda key: (draw(key, 4, 2), random.randint(key, (), 0, 4))
        ),
    },
}

MODULES: dict[str, ModuleType] = {
    "fdl": fdl,
    "nn": nn,
    "nn.init": nn.init,
    "interop": interop,
    "losses": losses,
    "metrics": metrics,
    "optim": optim,
    "optim.schedules": schedules,
    "random": random,
    "transforms": transforms,
    "data": data,
    "population": population,
    "debug": fdl.debug,
}

NO_ROW = {
    **{
        f"fdl.{name}": "a module" for name in fdl.__all__ if isinstance(vars(fdl)[name], ModuleType)
    },
    "fdl.Jitted": "a type",
    "fdl.Report": "a type",
    "fdl.StatefulLoss": "a type",
    "fdl.TrainState": "a type",
    "fdl.disable_jit": "a context",
    "fdl.eval_step": "makes a step: tests/training",
    "fdl.export": "writes a file: tests/compiler/test_export.py",
    "fdl.jit": "the whole of tests/compiler",
    "fdl.load_program": "reads a file: tests/compiler/test_export.py",
    "fdl.summary": "returns a text: tests/test_summary.py",
    "fdl.supervised": "makes a loss: tests/training",
    "fdl.while_loop": "torch.compile has no rule for vmap: tests/compiler/test_control_flow.py",
    "fdl.train_step": "makes a step: tests/training",
    "transforms.autograd_grad_and_value": "takes no transformation: tests/transforms",
    "fdl.averaged": "takes a TrainState: tests/training",
    "fdl.update_bn": "takes an iterator of batches: tests/training",
    "debug.nans": "a context",
    "metrics.CalibrationError": "a type",
    "metrics.ConfusionMatrix": "a type",
    "metrics.PrecisionRecallF1": "a type",
    "nn.Layer": "a type",
    "nn.Model": "a type",
    "nn.StatefulModel": "a type",
    "nn.init": "a module, in the table itself",
    "nn.init.Initializer": "a type",
    "interop.from_jax": "takes arrays: tests/interop/test_arrays.py",
    "interop.from_keras": "reads a file: tests/interop/test_keras.py",
    "interop.from_numpy": "takes arrays: tests/interop/test_arrays.py",
    "interop.from_orbax": "reads a checkpoint: tests/interop/test_orbax.py",
    "interop.to_jax": "gives arrays: tests/interop/test_arrays.py",
    "interop.to_module": "gives a module: tests/interop/test_module.py",
    "interop.to_sequential": "gives a module: tests/interop/test_to_sequential.py",
    "interop.to_numpy": "gives arrays: tests/interop/test_arrays.py",
    "optim.Optimizer": "a type",
    "optim.State": "a type",
    "optim.from_torch": "takes an optimizer of torch",
    "optim.to_torch": "takes an optimizer of torch",
    "optim.muon": "for matrices, in bfloat16: tests/optim/test_laws.py",
    "optim.scale_by_muon": "for matrices, in bfloat16: tests/optim/test_laws.py",
    "optim.Schedule": "a type",
    "optim.schedules": "a module, in the table itself",
    "nn.Policy": "a type",
    "random.Key": "a type",
    "random.Shape": "a type",
    "random.key": "takes an int, no tensor",
    **{
        f"random.{name}": "torch.compile has no rule for vmap of a loop: tests/random"
        for name in ("ball", "beta", "binomial", "dirichlet", "gamma", "poisson", "t")
    },
    **{
        f"data.{name}": "draws from beta: tests/data/test_mixing.py" for name in ("cutmix", "mixup")
    },
    "data.LABELS": "a constant",
    "data.Batch": "a type",
    "data.Dataset": "a type",
    "data.Indices": "a type",
    "data.fashion_mnist": "reads files",
    "data.fashion_mnist_sample": "reads files",
    "data.from_torchvision": "takes a data set, no tensor",
    "data.on_disk": "reads files",
    "data.stream": "starts a thread",
    "data.table": "reads files",
    "data.sequential_indices": "takes ints, no tensor",
    "population.size": "gives an int",
}

CASES = {f"{group}.{name}": case for group, rows in TABLE.items() for name, case in rows.items()}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_differentiable = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.grads], ids=[n for n, c in CASES.items() if c.grads]
)


def example(case: Case) -> tuple[Any, ...]:
    return case.inputs(random.key(11))


def examples(case: Case) -> list[tuple[Any, ...]]:
    return [case.inputs(key) for key in random.split(random.key(12), ROWS)]


def scalar(case: Case) -> Callable[..., Tensor]:
    """The case as one number in which every floating value of its result has a weight."""

    def weigh(leaf: Tensor) -> Tensor:
        numbers = torch.arange(1, leaf.numel() + 1, dtype=torch.float64)
        return (leaf * numbers.sin().view(leaf.shape)).sum()

    def f(*inputs: Any) -> Tensor:
        found = [leaf for leaf in tree.leaves(case.f(*inputs)) if leaf.is_floating_point()]
        return torch.stack([weigh(leaf) for leaf in found]).sum()

    return f


def gradient(case: Case) -> Callable[..., Any]:
    return grad(scalar(case), argnums=case.grads)


assert_equal = functools.partial(assert_trees_close, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODULES)
def test_table_has_a_row_for_every_public_name(name: str) -> None:
    public = set(MODULES[name].__all__)
    without = {n.rpartition(".")[2] for n in NO_ROW if n.rpartition(".")[0] == name}
    assert public == TABLE[name].keys() | without
    assert not TABLE[name].keys() & without


@each_case
def test_vmap_equals_a_loop(case: Case) -> None:
    rows = examples(case)
    got = vmap(case.f)(*tree.stack(rows))
    assert_equal(got, tree.stack([case.f(*row) for row in rows]))


@each_differentiable
def test_grad_equals_backward(case: Case) -> None:
    inputs = example(case)
    got = gradient(case)(*inputs)
    chosen = [inputs[i] for i in case.grads]
    for leaf in tree.leaves(chosen):
        leaf.requires_grad_()
    scalar(case)(*inputs).backward()
    expected = tree.map(
        lambda leaf: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, tuple(chosen)
    )
    assert_equal(got, expected)
    assert any(leaf.abs().max() > 1e-6 for leaf in tree.leaves(got))


TRANSFORMS: dict[str, Callable[[Case], Callable[..., Any]]] = {
    "f": lambda case: case.f,
    "vmap(f)": lambda case: vmap(case.f),
    "vmap(grad(f))": lambda case: vmap(gradient(case)),
}


def compiled_rows(group: str) -> dict[str, Case]:
    """The rows of a group that are compiled: `adam` has `scale_by_adam` in it."""
    return {
        name: case
        for name, case in TABLE[group].items()
        if name.removeprefix("scale_by_") == name or name.removeprefix("scale_by_") not in OPTIM
    }


# What is compiled as one function, one price for many rows; a large group in parts of 12 rows.
PROGRAMS = {
    f"{group}[{i}:]" if len(rows) > 30 else group: dict(list(rows.items())[i : i + size])
    for group, rows in ((group, compiled_rows(group)) for group in TABLE)
    for size in [12 if len(rows) > 30 else len(rows)]
    for i in range(0, len(rows), size)
}


def check_compiled(group: str, transform: str, backend: str) -> None:
    """Compile rows as one function, without graph breaks, and compare with each run eagerly."""
    needs_grad, batched = "grad" in transform, "vmap" in transform
    cases = {name: case for name, case in PROGRAMS[group].items() if case.grads or not needs_grad}
    rows = {name: examples(case) for name, case in cases.items()}
    inputs = {name: tree.stack(rows[name]) if batched else rows[name][0] for name in cases}

    def everything(inputs: Any) -> Any:
        return {name: TRANSFORMS[transform](case)(*inputs[name]) for name, case in cases.items()}

    torch._dynamo.reset()  # the code of `everything` is compiled many times, past Dynamo's limit
    got = torch.compile(everything, fullgraph=True, dynamic=False, backend=backend)(inputs)
    for name, case in cases.items():
        f = gradient(case) if needs_grad else case.f
        found = [f(*row) for row in rows[name]]
        assert_equal({name: got[name]}, {name: tree.stack(found) if batched else found[0]})


HAVE_GRADIENTS = [name for name, rows in PROGRAMS.items() if any(c.grads for c in rows.values())]


@pytest.mark.slow
@pytest.mark.parametrize("group", PROGRAMS)
def test_compiled_equals_eager(group: str) -> None:
    check_compiled(group, "f", "aot_eager")


# Of optimizers, which are long to trace, vmap is compiled together with grad below.
@pytest.mark.slow
@pytest.mark.parametrize("group", [name for name in PROGRAMS if not name.startswith("optim[")])
def test_compiled_vmap_equals_eager(group: str) -> None:
    check_compiled(group, "vmap(f)", "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("group", HAVE_GRADIENTS)
def test_compiled_vmap_of_grad_equals_eager(group: str) -> None:
    check_compiled(group, "vmap(grad(f))", "aot_eager")


@pytest.mark.slow
def test_compiled_by_inductor_equals_eager() -> None:
    check_compiled("losses", "vmap(grad(f))", "inductor")
