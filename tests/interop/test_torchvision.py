"""The families of torchvision's classification networks go in and out."""

import copy

import pytest
import torch
from torch import nn as oo
from torch.func import grad
from torchvision import models as tv
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.vgg import make_layers

from fdl import interop, random, tree
from tests.support.asserts import close, draw

KEY = random.key(4)


def small_head(net, inputs):
    """Give AlexNet and VGG a small head: their own has 50 million parameters and more."""
    net.classifier = oo.Sequential(oo.Linear(inputs, 4), oo.ReLU(True), oo.Linear(4, 3))
    net.to_empty(device="cpu")
    for part in net.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return net


def alexnet():
    with torch.device("meta"):
        net = tv.AlexNet(3)
    return small_head(net, 256 * 6 * 6)


def vgg():
    with torch.device("meta"):
        net = tv.VGG(make_layers([4, "M", 8, "M"], batch_norm=True), 3, init_weights=False)
    return small_head(net, 8 * 7 * 7)


def mobilenet(rate=0.0):
    block = InvertedResidualConfig(8, 3, 16, 8, True, "HS", 1, 1, width_mult=1.0)
    return tv.MobileNetV3([block], 8, num_classes=3, dropout=rate)


def efficientnet(rate=0.0):
    blocks = [MBConvConfig(2, 3, 1, 8, 8, 2, width_mult=1.0, depth_mult=1.0)]
    return tv.EfficientNet(blocks, rate, rate, num_classes=3)


def regnet():
    blocks = BlockParams.from_init_params(
        depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25
    )
    return tv.RegNet(blocks, num_classes=3)


def convnext(rate=0.0):
    return tv.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], rate, num_classes=3)


def vit(rate=0.0):
    return tv.VisionTransformer(32, 16, 1, 2, 8, 16, rate, rate, num_classes=3)


def swin(rate=0.0):
    return tv.SwinTransformer(
        [4, 4], 8, [1, 1], [2, 2], [2, 2], dropout=rate, attention_dropout=rate,
        stochastic_depth_prob=rate, num_classes=3,
    )  # fmt: skip


def densenet(rate=0.0):
    return tv.DenseNet(4, (1, 2), 8, drop_rate=rate, num_classes=3)


FAMILIES = {
    "AlexNet": (alexnet, 64),
    "VGG": (vgg, 32),
    "GoogLeNet": (lambda: tv.GoogLeNet(3, False, init_weights=False, dropout=0), 32),
    "Inception": (
        lambda: tv.Inception3(3, aux_logits=False, init_weights=False, dropout=0),
        75,
    ),
    "ResNet": (lambda: tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], 3), 32),
    "ResNeXt": (
        lambda: tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], 3, groups=4, width_per_group=2),
        32,
    ),
    "DenseNet": (densenet, 32),
    "MobileNet": (mobilenet, 32),
    "ShuffleNet": (lambda: tv.ShuffleNetV2([1, 1, 1], [8, 16, 16, 16, 16], 3), 32),
    "SqueezeNet": (lambda: tv.SqueezeNet("1_1", 3, dropout=0), 32),
    "MNASNet": (lambda: tv.MNASNet(0.25, 3, dropout=0), 32),
    "EfficientNet": (efficientnet, 32),
    "RegNet": (regnet, 32),
    "ConvNeXt": (convnext, 32),
    "ViT": (vit, 32),
    "Swin": (swin, 32),
}
# That draw random numbers: dropout, in attention too, and stochastic depth.
RANDOM = {f.__name__: f for f in (mobilenet, efficientnet, convnext, vit, swin, densenet)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A NumPy version")  # scipy's, which torchvision imports
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_in_and_out(name):
    make, size = FAMILIES[name]
    torch.manual_seed(0)
    module = make().double()
    x = draw(0, 4, 3, size, size)
    model, params, buffers = interop.from_module(module)
    stateful = bool(buffers)

    def run(params, train):
        values = (params, buffers) if stateful else (params,)
        result = model.apply(*values, x, train=train, key=None)
        return result if stateful else (result, {})

    def loss(params):
        y, new = run(params, True)
        return y.sin().sum(), (y, new)

    grads, (y, new) = grad(loss, has_aux=True)(params)
    evaluated = run(params, False)[0]
    out = interop.to_module(params, module, new if stateful else None)

    with torch.no_grad():
        close(evaluated, module.eval()(x))
    expected = module.train()(x)
    close(y, expected)
    expected.sin().sum().backward()
    got = tree.flatten_dict(grads)
    scale = max(p.grad.abs().max().item() for p in module.parameters())
    assert scale > 1e-3
    close(
        got,
        {path: p.grad for path, p in module.named_parameters()},
        rtol=1e-7,
        atol=1e-9 * scale,
    )
    close(dict(out.state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_family_follows_the_key(name):
    module, x = RANDOM[name](0.5).double(), draw(0, 4, 3, 32, 32)
    for p in module.parameters():  # ConvNeXt's scales and ViT's head start near 0
        oo.init.normal_(p, std=0.5)
    model, params, buffers = interop.from_module(copy.deepcopy(module))
    state = torch.get_rng_state()

    def run(key):
        if buffers:
            return model.apply(params, buffers, x, train=True, key=key)[0]
        return model.apply(params, x, train=True, key=key)

    one, again, other = run(KEY), run(KEY), run(random.key(5))
    assert torch.equal(one, again) and not torch.allclose(one, other)
    assert torch.equal(torch.get_rng_state(), state)
