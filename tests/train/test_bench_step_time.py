"""The models of `train.bench.step_time`, small and on the CPU."""

import pytest
import torch
import torch.nn.functional as F

import fdl
from fdl import random, tree
from train.bench import step_time
from train.bench.step_time import Transformer, transformer

SMALL = Transformer(layers=2, width=8, heads=2, vocabulary=11)


def test_a_token_is_predicted_from_those_before_it():
    model = transformer(SMALL)
    params = tree.cast(model.init(random.key(0)), torch.float64)
    tokens = random.randint(random.key(1), (3, 6), 0, 11)
    other = tokens.clone()
    other[:, 4] = (other[:, 4] + 1) % 11
    one, two = model.apply(params, tokens), model.apply(params, other)
    torch.testing.assert_close(one[:, :4], two[:, :4], rtol=1e-12, atol=1e-12)
    assert ((one - two)[:, 4:].abs().amax((0, 2)) > 1e-6).all()
    loss, metrics = step_time.next_token(model, params, tokens)
    expected = F.cross_entropy(one[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, expected)
    assert metrics["loss"].count == 3 * 5


def test_a_layer_is_that_of_torch():
    """`nn.TransformerEncoderLayer`, its biases zero and its norms as they begin."""
    layer = torch.nn.TransformerEncoderLayer(
        8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    model = transformer(SMALL._replace(layers=1))
    params = tree.cast(model.init(random.key(0)), torch.float64)
    ours = params["layers"]["0"]
    theirs = {
        "self_attn.in_proj_weight": ours["qkv"],
        "self_attn.out_proj.weight": ours["out"],
        "linear1.weight": ours["up"],
        "linear2.weight": ours["down"],
    }
    biases = {name: torch.zeros_like(p) for name, p in layer.named_parameters() if "bias" in name}
    layer.load_state_dict(theirs | biases, strict=False)
    tokens = random.randint(random.key(1), (3, 6), 0, 11)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    found = layer(F.embedding(tokens, params["embedding"]), mask, is_causal=True)
    expected = F.linear(F.layer_norm(found, (8,)), params["embedding"])
    torch.testing.assert_close(model.apply(params, tokens), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "time",
    [
        lambda: step_time.lenet("cpu", batch=2, steps=2),
        lambda: step_time.resnet("cpu", batch=2, pixels=32),
        lambda: step_time.billion("cpu", batch=2, length=4, sizes=SMALL),
    ],
    ids=["lenet", "resnet", "billion"],
)
def test_each_step_runs(time, monkeypatch):
    monkeypatch.setattr(step_time, "WARM_UP", 0)
    monkeypatch.setattr(step_time, "REPEATS", 1)
    with fdl.disable_jit():
        seconds, params = time()
    assert seconds > 0 and params > 100


def test_what_was_measured_is_that_big():
    d, layers, words = Transformer().width, Transformer().layers, Transformer().vocabulary
    assert 12 * layers * d**2 + words * d == 973_078_528
