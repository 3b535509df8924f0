"""Every rule of `from_module` takes every spelling of a call that torch takes."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fdl import _modes, random
from fdl.interop._key_mode import RULES, KeyedRandomMode
from tests.support.asserts import close, draw

KEY = random.key(3)

X, IMAGE, SEQ = draw(0, 3, 4), draw(1, 2, 4, 3, 3), draw(2, 5, 2, 4)
ROW, MEAN, VAR = draw(3, 4), draw(4, 4), draw(5, 4).exp()
IDS = torch.tensor([[0, 2], [1, 0]])
RATE = {"p": 0.4, "training": True}
NORM = {
    "input": IMAGE, "weight": ROW, "bias": MEAN, "running_mean": MEAN, "running_var": VAR,
    "momentum": 0.3, "eps": 1e-3,
}  # fmt: skip
ATTENTION = {"query": IMAGE, "key": IMAGE, "value": IMAGE}
BATCH, INSTANCE = NORM | {"training": True}, NORM | {"use_input_stats": True}
LSTM = [draw(6, 12, 4), draw(7, 12, 3), draw(8, 12), draw(9, 12)]
RECURRENT = {
    "hx": draw(10, 1, 2, 3), "has_biases": True, "num_layers": 1, "dropout": 0.0, "train": True,
    "bidirectional": False, "batch_first": False, "input": SEQ,
}  # fmt: skip
CELL = {"input": X, "hx": draw(10, 3, 3), "b_ih": None, "b_hh": None}


def weights(gates):
    return [draw(6, 3 * gates, 4), draw(7, 3 * gates, 3), draw(8, 3 * gates), draw(9, 3 * gates)]


def cell(gates):
    return CELL | dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), weights(gates), strict=True))


def two_states(values):
    return values | {"hx": [values["hx"], values["hx"] + 1]}


# For each rule: one call's arguments by name, or those of several overloads.
ARGUMENTS = {
    "F.dropout": {"input": X, **RATE},
    "F.dropout1d": {"input": IMAGE[0], **RATE},
    "F.dropout2d": {"input": IMAGE, **RATE},
    "F.dropout3d": {"input": IMAGE[None], **RATE},
    "F.alpha_dropout": {"input": X, **RATE},
    "F.feature_alpha_dropout": {"input": IMAGE, **RATE},
    "F.rrelu": {"input": X, "lower": 0.1, "upper": 0.2, "training": True},
    "torch.dropout": {"input": X, "p": 0.4, "train": True},
    "torch.alpha_dropout": {"input": X, "p": 0.4, "train": True},
    "torch.feature_alpha_dropout": {"input": IMAGE, "p": 0.4, "train": True},
    "torch.rrelu": {"input": X, "lower": 0.1, "upper": 0.2, "training": True, "generator": None},
    "F.gumbel_softmax": {"logits": X, "tau": 0.5, "hard": True, "dim": 0},
    "F.multi_head_attention_forward": {
        "query": SEQ, "key": SEQ, "value": SEQ, "embed_dim_to_check": 4, "num_heads": 2,
        "in_proj_weight": draw(6, 12, 4), "in_proj_bias": draw(7, 12), "bias_k": None,
        "bias_v": None, "add_zero_attn": False, "dropout_p": 0.3,
        "out_proj_weight": draw(8, 4, 4), "out_proj_bias": None,
    },
    "F.scaled_dot_product_attention": [
        ATTENTION | {"dropout_p": 0.0, "is_causal": True, "scale": 0.3, "enable_gqa": False},
        ATTENTION | {"key": IMAGE[:, :2], "value": IMAGE[:, 2:], "enable_gqa": True},
        ATTENTION | {"attn_mask": torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]]).bool()},
        ATTENTION | {"attn_mask": draw(12, 4, 3, 3), "dropout_p": 0.0, "is_causal": False},
        ATTENTION | {"attn_mask": torch.tensor([0.0, -torch.inf, 1.0]).double().expand(3, 3)},
        ATTENTION | {"key": IMAGE[..., :2, :], "value": IMAGE[..., :2, :], "is_causal": True},
    ],
    "torch.lstm": two_states(RECURRENT | {"params": weights(4)}),
    "torch.gru": RECURRENT | {"params": weights(3)},
    "torch.rnn_tanh": RECURRENT | {"params": weights(1)},
    "torch.rnn_relu": RECURRENT | {"params": weights(1)},
    "torch.lstm_cell": two_states(cell(4)),
    "torch.gru_cell": cell(3),
    "torch.rnn_tanh_cell": cell(1),
    "torch.rnn_relu_cell": cell(1),
    "torch.rand": {"size": (3, 2), "dtype": torch.float64, "device": "cpu", "layout": torch.strided,
                   "pin_memory": False, "generator": None, "names": None},
    "torch.randn": {"size": [3], "dtype": None, "device": None, "generator": None},
    "torch.rand_like": {"input": X, "dtype": torch.float16, "layout": torch.strided,
                        "memory_format": torch.preserve_format, "pin_memory": False},
    "torch.randn_like": {"input": IMAGE, "memory_format": torch.channels_last, "device": "cpu"},
    "torch.randint": {"low": 2, "high": 9, "size": (3,), "dtype": torch.int16, "generator": None},
    "torch.randperm": {"n": 5, "dtype": torch.int32, "generator": None, "pin_memory": False},
    "torch.normal": [
        {"mean": 1.0, "std": 2.0, "size": (3,), "generator": None, "dtype": torch.float64},
        {"mean": X, "std": 2.0, "generator": None},
        {"mean": 1.0, "std": VAR},
        {"mean": X, "std": VAR},
    ],
    "torch.bernoulli": [
        {"input": X.sigmoid(), "generator": None},
        {"input": X, "p": 0.3, "generator": None},
    ],
    "Tensor.bernoulli": [{"input": X.sigmoid()}, {"input": X, "p": 0.3, "generator": None}],
    "Tensor.bernoulli_": [
        {"input": X, "p": 0.3, "generator": None},
        {"input": X, "p": VAR.clamp(max=1)},
    ],
    "Tensor.uniform_": {"input": X, "from": -1.0, "to": 3.0, "generator": None},
    "Tensor.normal_": {"input": X, "mean": 1.0, "std": 2.0, "generator": None},
    "Tensor.exponential_": {"input": X, "lambd": 2.0, "generator": None},
    "init.uniform_": {"tensor": X, "a": -1.0, "b": 2.0, "generator": None},
    "init.normal_": {"tensor": X, "mean": 1.0, "std": 2.0, "generator": None},
    "init.kaiming_uniform_": {"tensor": X, "a": 0.1, "mode": "fan_out",
                              "nonlinearity": "leaky_relu", "generator": None},
    "torch.empty": {"size": (3, 2), "dtype": torch.float64},
    "torch.empty_like": {"input": X, "dtype": torch.float32},
    "Tensor.new_empty": {"input": X, "size": (2, 3), "dtype": torch.float32},
    "Tensor.unflatten": {"input": X, "dim": 1, "sizes": (2, 2)},
    "F.batch_norm": [BATCH, BATCH | {"training": False}, {"input": X} | {
        "running_mean": None, "running_var": None, "weight": ROW, "training": True}],
    "F.instance_norm": [INSTANCE, INSTANCE | {"use_input_stats": False}, {"input": IMAGE}],
    "torch.batch_norm": BATCH | {"cudnn_enabled": True},
    "torch.instance_norm": INSTANCE | {"cudnn_enabled": True},
    "F.layer_norm": {"input": X, "normalized_shape": (4,), "weight": ROW, "bias": MEAN, "eps": 0.1},
    "torch.layer_norm": {"input": X, "normalized_shape": (4,), "weight": ROW, "bias": MEAN,
                         "eps": 0.1, "cudnn_enable": True},
    "F.group_norm": {"input": IMAGE, "num_groups": 2, "weight": ROW, "bias": MEAN, "eps": 0.1},
    "torch.group_norm": {"input": IMAGE, "num_groups": 2, "weight": ROW, "bias": MEAN, "eps": 0.1,
                         "cudnn_enabled": True},
    "F.rms_norm": {"input": X, "normalized_shape": (4,), "weight": ROW, "eps": None},
    "torch.rms_norm": {"input": X, "normalized_shape": (4,), "weight": ROW, "eps": 0.1},
    "F.normalize": {"input": X, "p": 2.0, "dim": 0, "eps": 1e-6, "out": None},
    "torch._weight_norm": [{"v": IMAGE, "g": VAR[:2].view(2, 1, 1, 1), "dim": 0},
                           {"v": X, "g": VAR[None], "dim": 1}],
    "F.embedding": {"input": IDS, "weight": X, "padding_idx": -3, "max_norm": None,
                    "norm_type": 2.0, "scale_grad_by_freq": False, "sparse": True},
    "torch.embedding": {"weight": X, "indices": IDS, "padding_idx": 0, "sparse": False,
                        "scale_grad_by_freq": False},
    "F.embedding_bag": {"input": IDS, "weight": X, "offsets": None, "max_norm": None,
                        "norm_type": 2, "scale_grad_by_freq": False, "mode": "sum",
                        "sparse": True, "per_sample_weights": X[:2, :2],
                        "include_last_offset": False, "padding_idx": 0},
    "F.glu": {"input": X, "dim": 1},
    "F.hardsigmoid": {"input": 3 * X, "inplace": False},
    "F.mse_loss": [
        {"input": X, "target": X.sin(), "reduction": "sum"},
        {"input": X, "target": X.sin(), "size_average": None, "reduce": None, "reduction": "none"},
    ],
    "F.huber_loss": {"input": X, "target": X.sin(), "reduction": "mean", "delta": 0.1},
    "F.soft_margin_loss": {"input": X, "target": X.sign(), "size_average": None, "reduce": None,
                           "reduction": "mean"},
    "F.ctc_loss": {"log_probs": SEQ.log_softmax(-1), "targets": torch.tensor([[1], [2]]),
                   "input_lengths": torch.tensor([5, 5]), "target_lengths": torch.tensor([1, 1]),
                   "blank": 0, "reduction": "sum", "zero_infinity": True},
    "F.multi_margin_loss": {"input": X, "target": torch.tensor([0, 1, 2]), "p": 2, "margin": 0.5},
    "F.multilabel_margin_loss": {"input": X, "target": torch.tensor([[3, -1, 0, 0]] * 3),
                                 "reduction": "sum"},
}  # fmt: skip

DRAWS = {name for name in RULES if any(
    part in name for part in ("drop", "rrelu", "rand", "normal", "bernoulli", "uniform", "expon",
    "gumbel", "empty", "multi_head"))} - {"F.normalize"}  # fmt: skip
FIRST_ONLY = {
    *("F.ctc_loss", "F.multi_margin_loss", "F.multilabel_margin_loss", "F.embedding_bag"),
}


def function(name):
    place, _, short = name.partition(".")
    owner = {"F": F, "torch": torch, "Tensor": Tensor, "init": torch.nn.init}[place]
    return getattr(owner, short)


def signatures(name):
    """Give the names of the positional parameters, once for each overload."""
    place, _, short = name.partition(".")
    f = function(name)
    if inspect.isfunction(f) and place != "Tensor":
        return [list(inspect.signature(f).parameters)]
    packet = getattr(torch.ops.aten, short)
    found = []
    for overload in packet.overloads():
        arguments = getattr(packet, overload)._schema.arguments
        if not any(a.is_out for a in arguments):
            names = ["input" if a.name == "self" else a.name for a in arguments if not a.kwarg_only]
            found.append(names)
    return found


def spellings(name, arguments):
    """Give (args, kwargs): any number of arguments by position, the others by keyword, or not."""
    seen = []
    for positional in signatures(name):
        known = [p for p in positional if p in arguments]
        for n in range(len(known) + 1):
            if known[:n] != positional[:n]:
                break
            rest = {p: v for p, v in arguments.items() if p not in known[:n]}
            shorter = {p: v for p, v in rest.items() if v is not None}
            for kwargs in (rest, shorter):
                given = [arguments[p] for p in known[:n]], kwargs
                seen.append(given)
                if "size" in known[:n] and known[:n][-1] == "size" and len(known[:n]) == 1:
                    seen.append(([*arguments["size"]], kwargs))  # torch.rand(3, 2)
    return seen


def call(f, args, kwargs):
    """Call with copies, since some functions fill what they are given."""
    copy = lambda x: x.clone() if isinstance(x, Tensor) else x  # noqa: E731
    torch.manual_seed(0)
    return f(*map(copy, args), **{name: copy(x) for name, x in kwargs.items()})


def leaves(y):
    return list(y) if isinstance(y, tuple | list) else [y]


def check(name, arguments, expect_value):
    f, count, first = function(name), 0, None
    for args, kwargs in spellings(name, arguments):
        try:
            expected = call(f, args, kwargs)
        except (TypeError, RuntimeError, AttributeError):
            continue  # torch does not take this spelling
        count += 1
        with KeyedRandomMode(KEY):
            got = call(f, args, kwargs)
        first = got if first is None else first
        for x, y, z in zip(leaves(got), leaves(expected), leaves(first), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()
            if "empty" not in name:
                close(x, z, rtol=0, atol=0)
            if expect_value:
                close(x, y)
    return count


@pytest.mark.parametrize("name", RULES)
def test_every_spelling(name):
    rows = ARGUMENTS[name] if isinstance(ARGUMENTS[name], list) else [ARGUMENTS[name]]
    counts = [check(name, arguments, name not in DRAWS) for arguments in rows]
    assert min(counts) >= 1 and sum(counts) >= 2, counts


@pytest.mark.parametrize("name", sorted(RULES.keys() - DRAWS - FIRST_ONLY - {"Tensor.unflatten"}))
def test_what_is_written_out_equals_the_kernel_in_every_spelling(name, monkeypatch):
    monkeypatch.setattr(_modes, "beyond_first", lambda: True)
    test_every_spelling(name)


def test_every_rule_has_a_row():
    assert ARGUMENTS.keys() == RULES.keys()


def test_random_integers_by_one_bound():
    with KeyedRandomMode(KEY):
        expected = torch.randint(0, 5, (3,))
        for other in (
            lambda: torch.randint(5, (3,)), lambda: torch.randint(0, 5, size=(3,)),
            lambda: torch.randint(5, size=[3]), lambda: torch.randint(high=5, size=(3,)),
            lambda: torch.randint(0, high=5, size=torch.Size([3])),
        ):  # fmt: skip
            with KeyedRandomMode(KEY):
                assert torch.equal(other(), expected)


def test_a_result_can_be_asked_to_require_grad_or_be_written():
    with KeyedRandomMode(KEY):
        assert torch.randn(3, requires_grad=True).requires_grad
    out = torch.empty(3, dtype=torch.float64)
    with KeyedRandomMode(KEY):
        assert torch.rand(3, out=out) is out
    with KeyedRandomMode(KEY):
        assert torch.equal(torch.rand(3, dtype=torch.float64), out)


@pytest.mark.parametrize(
    "f",
    [
        lambda: torch.rand(3, generator=torch.Generator()),
        lambda: torch.empty(3).normal_(generator=torch.Generator()),
        lambda: torch.rand(3, layout=torch.sparse_coo),
        lambda: torch.nn.init.normal_(torch.empty(3), generator=torch.Generator()),
    ],
)
def test_what_no_key_can_do_is_refused_by_name(f):
    with (
        pytest.raises(NotImplementedError, match=r"torch.Generator cannot draw|layout="),
        KeyedRandomMode(KEY),
    ):
        f()
