"""Images mixed with others of their batch, and labels with theirs: mixup and CutMix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdl import random
from fdl._checks import check_at_least_0, describe
from fdl._numerics import is_visible
from fdl.data._augment import check_images
from fdl.data._forms import batch_of
from fdl.data._types import Batch
from fdl.metrics._checks import is_integer
from fdl.random import Key


def mixup(key: Key, batch: Batch, alpha: float, classes: int) -> Batch:
    """Mix each example with another: x = λ x₁ + (1 − λ) x₂, and their labels likewise.

    Source: Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018,
    https://arxiv.org/abs/1710.09412. Each row has a λ of its own, from Beta(α, α), and a partner
    from a random permutation of the rows. A row of padding is nobody's partner: who would have it
    stays as it is.

    Args:
        key: a key, int64 [2].
        batch: a batch in any form: images `[batch, channels, height, width]`, floating, with labels
            `[batch]`, or with probabilities `[batch, classes]`, such as another mixture has.
        alpha: of the distribution of λ, positive; small ones leave most images nearly unmixed.
        classes: number of classes.

    Returns:
        The batch with floating labels `[batch, classes]`, as `losses.cross_entropy` takes them.

    Raises:
        TypeError: `key` is not a key, x not floating, y neither integers nor floating, or an option
            not a number.
        ValueError: a shape does not fit, or an option is not positive; when run eagerly on the CPU,
            a label that counts is not a class (else its loss is NaN).

    >>> batch = Batch(torch.eye(2).reshape(2, 1, 1, 2), torch.tensor([0, 1]))
    >>> mixed = mixup(random.key(1), batch, 1.0, classes=2)
    >>> torch.equal(mixed.x.flatten(1), mixed.y)  # here an image is its own label
    True
    """
    x, y, mask = _parts("mixup", key, batch, alpha, classes)
    share_key, partner_key = random.split(key)
    share = random.beta(share_key, alpha, alpha, (len(x),), y.dtype)
    partner = _partners(partner_key, len(x), mask)
    keep = share.to(x.dtype)[:, None, None, None]
    labels = share[:, None] * y + (1 - share[:, None]) * y[partner]
    return Batch(keep * x + (1 - keep) * x[partner], labels, mask)


def cutmix(key: Key, batch: Batch, alpha: float, classes: int) -> Batch:
    """Replace a box of each image by that of another; labels are mixed by what is left of each.

    Source: Yun et al., CutMix, 2019, https://arxiv.org/abs/1905.04899. Each row has a box of its
    own: a share 1 − λ of the image, λ from Beta(α, α), about a centre drawn uniformly, of which
    the part outside the image is lost. The box is that of `torchvision.transforms.v2.CutMix`, and
    so are the labels: their weights are the areas. Partners are those of `mixup`.

    Args:
        key: a key, int64 [2].
        batch: a batch in any form: images `[batch, channels, height, width]`, floating, with labels
            `[batch]`, or with probabilities `[batch, classes]`.
        alpha: of the distribution of λ, positive; 1 makes it uniform.
        classes: number of classes.

    Returns:
        The batch with floating labels `[batch, classes]`, as `losses.cross_entropy` takes them.

    Raises:
        TypeError: as for `mixup`.
        ValueError: as for `mixup`.

    >>> batch = Batch(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4),
    ...               torch.tensor([0, 1]))
    >>> mixed = cutmix(random.key(7), batch, 1.0, classes=2)
    >>> torch.equal(mixed.x.mean((1, 2, 3)), mixed.y[:, 1])
    True
    """
    x, y, mask = _parts("cutmix", key, batch, alpha, classes)
    share_key, partner_key, *centre_keys = random.split(key, 4)
    half = (1 - random.beta(share_key, alpha, alpha, (len(x),), torch.float64)).sqrt() / 2
    partner = _partners(partner_key, len(x), mask)
    inside = []
    for k, n in zip(centre_keys, x.shape[-2:], strict=True):
        centre, reach = random.randint(k, (len(x),), 0, max(1, n)), (half * n).long()
        pixels = torch.arange(n, device=x.device)
        inside.append((pixels >= (centre - reach)[:, None]) & (pixels < (centre + reach)[:, None]))
    rows, columns = inside
    area = (rows.sum(1) * columns.sum(1)).to(y.dtype) / (x.shape[-2] * x.shape[-1])
    box = (rows[:, :, None] & columns[:, None, :])[:, None]
    labels = (1 - area[:, None]) * y + area[:, None] * y[partner]
    return Batch(torch.where(box, x[partner], x), labels, mask)


def _partners(key: Key, n: int, mask: Tensor | tuple[()]) -> Tensor:
    """Draw another row for each, or itself where that is padding: int64 [n]."""
    partner = random.permutation(key, n)
    if not isinstance(mask, Tensor):
        return partner
    return torch.where(mask[partner] != 0, partner, torch.arange(n, device=partner.device))


def _parts(
    caller: str, key: Key, batch: Batch, alpha: float, classes: int
) -> tuple[Tensor, Tensor, Tensor | tuple[()]]:
    """Check the arguments; return images, probabilities `[batch, classes]` and mask."""
    x, y, mask = batch_of(caller, batch)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError(f"{caller}: batch must be a Batch of two tensors, got {describe(batch)}")
    check_images(caller, key, x)
    if not x.is_floating_point():
        raise TypeError(f"{caller}: x must be floating, got {describe(x)}; see data.to_float")
    check_at_least_0(caller, alpha=alpha)
    if not isinstance(classes, int) or isinstance(classes, bool):
        raise TypeError(f"{caller}: classes must be an int, got {describe(classes)}")
    if x.ndim != 4:
        raise ValueError(
            f"{caller}: x must be [batch, channels, height, width], got {list(x.shape)}"
        )
    if not alpha or classes < 1:
        raise ValueError(f"{caller}: alpha and classes must be positive, got {alpha}, {classes}")
    whole = is_integer(y)
    if y.shape != ((len(x),) if whole else (len(x), classes)):
        raise ValueError(
            f"{caller}: y must be labels [{len(x)}], or probabilities [{len(x)}, {classes}], got "
            f"{describe(y)}"
        )
    if whole:
        y = _shares(caller, y, classes, mask).to(x.dtype)
    return x, y, mask


def _shares(caller: str, labels: Tensor, classes: int, mask: Tensor | tuple[()]) -> Tensor:
    """Return 1 for the class of a label, 0 for others; NaN for one that counts and is no class."""
    wrong = (labels.long() < 0) | (labels.long() >= classes)
    if isinstance(mask, Tensor):
        wrong = wrong & (mask != 0)  # padding may have any label
    if is_visible(wrong) and wrong.any():
        raise ValueError(
            f"{caller}: labels must be from 0 to classes - 1 = {classes - 1}, got "
            f"{labels[wrong][0]}; mask leaves rows out"
        )
    shares = labels[:, None] == torch.arange(classes, device=labels.device)
    return shares.double().masked_fill(wrong[:, None], math.nan)
