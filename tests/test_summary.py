"""`fdl.summary` against torch's own counts for each module of the twins, and against formulas."""

import functools
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fdl
import models
from fdl import interop, nn, random, testing, tree
from fdl._table import WIDTH, aligned
from models import torch_modules

IMAGES = torch.empty(64, 1, 28, 28, device="meta")
TWINS = {
    "mlp": torch_modules.mlp,
    "cnn": torch_modules.CNN,
    "lenet": torch_modules.LeNet,
    "transformer": torch_modules.Transformer,
}


def rows(table: str) -> dict[str, list[str]]:
    """The cells of a table by layer; their columns are found by the header."""
    header, *lines = table.split("\n")
    starts = [0, header.index("parameters"), header.index("output")]
    ends = [header.index(name) + len(name) for name in ("count", "FLOPs")]
    found = {}
    for line in lines:
        padded = line.ljust(ends[1])
        name, params = (padded[i:j].strip() for i, j in itertools.pairwise(starts))
        output, _, count = padded[starts[2] : ends[0]].partition("  ")
        found[name] = [params, output.strip(), count.strip(), padded[ends[0] :].strip()]
    return found


def flops(table: str) -> dict[str, int]:
    return {name: int(r[3].replace(",", "")) for name, r in rows(table).items() if r[3]}


@pytest.mark.parametrize("name", TWINS)
def test_a_layer_has_the_flops_and_parameters_that_torch_counts_in_its_module(name):
    module = TWINS[name]().eval()
    with FlopCounterMode(display=False) as counter:
        module.to("meta")(IMAGES)
    counts = {
        path.partition(".")[2]: sum(of_ops.values())
        for path, of_ops in counter.get_flop_counts().items()
    }
    model = getattr(models, name)()
    params = model.init(random.key(0))  # without memory it would be slow
    table = fdl.summary(model.apply, params, IMAGES)
    got = flops(table)
    assert got.pop("total") == counter.get_total_flops() == sum(got.values()) > 0
    assert got == {path: counts[path] for path in got}
    own = {path: sum(p.numel() for p in m.parameters()) for path, m in module.named_modules()}
    sizes = {n: int(r[2].replace(",", "")) for n, r in rows(table).items() if r[2]}
    assert sizes.pop("total") == own[""] == sum(sizes.values())
    assert sizes == {path: own[path] for path in sizes}
    assert max(map(len, table.split("\n"))) <= WIDTH and "…" not in table


def test_lenet_by_hand():
    model = models.lenet()
    images = torch.empty(256, 1, 28, 28, device="meta")
    table = fdl.summary(model.apply, model.init(random.key(0)), images)
    assert flops(table) == {
        "conv.0": 2 * 256 * 24 * 24 * 6 * 5 * 5,
        "conv.3": 2 * 256 * 8 * 8 * 16 * 6 * 5 * 5,
        "fc.0": 2 * 256 * 256 * 120,
        "fc.2": 2 * 256 * 120 * 84,
        "fc.4": 2 * 256 * 84 * 10,
        "total": 144_199_680,
    }
    layers = [f"conv.{i}" for i in range(6)] + ["flatten"] + [f"fc.{i}" for i in range(5)]
    assert list(rows(table)) == [*layers, "total"]
    assert rows(table)["conv.3"][:3] == ["16×6×5×5, 16", "256×16×8×8", "2,416"]
    assert rows(table)["conv.1"] == ["", "256×6×12×12", "", ""]
    assert rows(table)["total"][:3] == ["", "256×10", "44,426"]


@pytest.mark.parametrize("causal", [False, True])
def test_a_transformer_layer_by_hand(causal):
    b, n, d, h = 3, 7, 8, 20
    layer = nn.transformer_encoder_layer(d, 2, dim_feedforward=h, causal=causal)
    params = layer.init(random.key(0))
    assert flops(fdl.summary(layer.apply, params, torch.empty(b, n, d))) == {
        "self_attn": 2 * b * n * d * 3 * d + 2 * (2 * b * n * n * d) + 2 * b * n * d * d,
        "linear1": 2 * b * n * d * h,
        "linear2": 2 * b * n * d * h,
        "total": b * n * d * (8 * d + 4 * n + 4 * h),
    }


def test_a_loop_counts_each_step():
    layer = nn.lstm(8, 16)
    table = fdl.summary(layer.apply, layer.init(random.key(0)), torch.empty(32, 10, 8))
    assert flops(table) == {"total": 2 * 32 * 10 * (8 + 16) * 4 * 16}
    assert "32×10×16, 1…×16, 1×32×16" in table  # y, (h, c)


def test_a_function_of_parameters_is_listed_by_path():
    def apply(params, x):
        return torch.vmap(lambda row: params["out"]["w"] @ (params["in"]["w"] @ row).relu())(x)

    params = {"in": {"w": torch.ones(5, 3)}, "out": {"w": torch.ones(2, 5)}}
    params["scale"] = torch.ones(())
    expected = (
        "layer  parameters  output  count  FLOPs\n"
        "in     5×3                    15\n"
        "out    2×5                    10\n"
        "scale  scalar                  1\n"
        "total              4×2        26    200"
    )
    assert fdl.summary(apply, params, torch.ones(4, 3)) == expected
    assert fdl.summary(functools.partial(apply), params, torch.ones(4, 3)) == expected
    with testing.count_programs() as programs:
        assert fdl.summary(fdl.jit(apply), params, torch.ones(4, 3)) == expected
    assert programs.count == 0


def test_names_that_a_function_records_and_what_has_none():
    def apply(params, x, *, train=False, key=None, record=None):
        hidden = x @ params["w"]
        if record is not None:
            record("hidden", hidden)
        return hidden @ params["v"]

    params = {"w": torch.ones(3, 5), "v": torch.ones(5, 2)}
    table = fdl.summary(apply, params, torch.ones(4, 3))
    assert flops(table) == {"hidden": 120, "no layer": 80, "total": 200}
    net = nn.sequential(body=nn.Model(lambda key: params, apply), end=nn.relu)
    table = fdl.summary(net, torch.ones(4, 3))
    assert flops(table) == {"body.hidden": 120, "body": 80, "total": 200}
    assert rows(table)["body"][:3] == ["3×5, 5×2", "4×2", "25"]


def test_a_module_and_shared_parameters():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())
    module.append(module[0])
    model, *_ = interop.from_module(module)
    table = fdl.summary(model, torch.ones(4, 3))
    assert rows(table)["0"] == ["3×3, 3", "4×3", "12", "72"]
    assert rows(table)["total"] == ["", "4×3", "12", "144"]


@pytest.mark.parametrize("net", [nn.linear(3, 4), nn.batch_norm(3)], ids=["Model", "Stateful"])
def test_parameters_beside_a_model_are_too_many(net):
    with pytest.raises(TypeError, match=r"number of inputs than 2; its parameters are made here"):
        fdl.summary(net, net.init(random.key(0)), torch.ones(5, 3))


def test_a_model_with_buffers():
    net = nn.sequential(nn.linear(3, 4), nn.batch_norm(4), nn.relu)
    assert fdl.summary(net, torch.ones(5, 3)) == (
        "layer  parameters  output  count  FLOPs\n"
        "0      4×3, 4      5×4        16    120\n"
        "1      4, 4        5×4         8\n"
        "2                  5×4\n"
        "total              5×4        24    120"
    )


def test_nothing_is_computed_or_kept():
    seen = []
    params = {"w": torch.empty(2**30, 2**20, device="meta")}  # 4 petabytes

    def apply(params, x):
        seen.append(x)
        return x @ params["w"]

    table = fdl.summary(apply, params, torch.empty(2**10, 2**30, device="meta"))
    assert flops(table) == {"total": 2 * 2**10 * 2**30 * 2**20}
    assert type(seen[0]).__name__ == "FakeTensor" and seen[0].device.type == "cpu"
    layer = nn.linear(3, 2)
    fdl.summary(layer, torch.ones(0, 3))
    assert type(layer.apply(layer.init(random.key(0)), torch.ones(2, 3))) is Tensor


def test_several_inputs():
    def apply(params, x, *, train=False, key=None):
        return {"sum": x["a"] + x["b"] @ params["w"]}

    model = nn.Model(lambda key: {"w": random.normal(key, (3, 2))}, apply)
    table = fdl.summary(model, {"a": torch.ones(2), "b": torch.ones(5, 3)})
    assert rows(table)["total"] == ["", "5×2", "6", "60"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fdl.summary(models.lenet()), TypeError, "the input is missing, got a Model and 0"),
        (lambda: fdl.summary(lambda p, x: x, {}), TypeError, r"or summary\(apply, params, x\)"),
        (lambda: fdl.summary(torch.nn.Linear(1, 1), 1), TypeError, "interop.from_module makes"),
        (lambda: fdl.summary(nn.linear, IMAGES), TypeError, "makes a layer: call it"),
        (lambda: fdl.summary(3, IMAGES), TypeError, "a Model or a StatefulModel, got an int"),
        (lambda: fdl.summary(lambda p, x: x[x > 0], {}, IMAGES), ValueError, "reads the values"),
        (lambda: fdl.summary(lambda p, x: x.sum().item(), {}, IMAGES), ValueError, "reads the val"),
        (lambda: fdl.summary(lambda p, x: [1][bool(x.sum())], {}, IMAGES), ValueError, "reads the"),
    ],
)  # fmt: skip
def test_what_it_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_table_shortens_what_does_not_fit():
    name = "encoder.layers.0." * 8 + "weight"
    text = aligned([("layer", "count"), (name, "1,000"), ("b", "5")], numbers=[1], limits=(80, 9))
    header, first, last = text.split("\n")
    assert len(header) == len(first) == len(last) == WIDTH and last == "b" + "5".rjust(79)
    assert first.startswith("encoder.") and "…" in first and first.endswith("weight  1,000")
    assert aligned([("a", "")]) == "a" and tree.summary({}).startswith("path   shape")
