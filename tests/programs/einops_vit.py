"""Patches of images by einops: rearrange, reduce, repeat, pack and einsum in a mixer's step."""

from __future__ import annotations

import torch
from einops import einsum, pack, rearrange, reduce, repeat, unpack

from fdl import random
from tests.support.programs import Program


def step(params, images):
    patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
    classes = repeat(params["class"], "d -> b 1 d", b=len(images))
    tokens, shapes = pack([classes, patches], "b * d")
    mixed = tokens + einsum(params["mix"], torch.tanh(tokens), "t s, b s d -> b t d")
    first, rest = unpack(mixed, shapes, "b * d")
    pooled = reduce(rest, "b (h w) d -> b d h", "mean", h=2)
    back = rearrange(rest, "b (h w) (p q c) -> b c (h p) (w q)", h=2, p=2, q=2)
    mean = reduce(first, "b 1 d -> d", "mean")
    params = {"class": 0.9 * params["class"] + 0.1 * mean, "mix": params["mix"] * 0.95}
    return params, {"pooled": pooled, "back": back, "most": reduce(back, "b c h w -> c", "max")}


def init():
    first, second = random.split(random.key(0))
    return {
        "class": random.normal(first, (12,), torch.float64),
        "mix": random.normal(second, (5, 5), torch.float64),
    }


def xs():
    return random.normal(random.key(1), (4, 2, 3, 4, 4), torch.float64)


PROGRAM = Program(step, init, xs)
