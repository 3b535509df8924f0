"""The state of L-BFGS."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fdl._kinds import register
from fdl.optim._hyperparams import Hyper


@register
class LBFGSState(NamedTuple):
    """The state of `lbfgs`, with the names of `torch.optim.LBFGS`.

    n counts the elements of all parameters, in the order of the leaves; m is `history_size`.
    Histories end with the newest entry and are zero before the oldest.

    >>> import torch
    >>> from fdl.optim import lbfgs
    >>> lbfgs(history_size=5).init({"w": torch.ones(2), "b": torch.ones(1)}).old_dirs.shape
    torch.Size([5, 3])
    """

    hyper: Hyper
    d: Tensor  # [n], the last direction
    t: Tensor  # float64 [], the step along it
    old_dirs: Tensor  # [m, n], differences of gradients, y
    old_stps: Tensor  # [m, n], the steps between them, s
    ro: Tensor  # [m], 1 / (y · s)
    H_diag: Tensor  # [], γ: the initial inverse Hessian is γI
    prev_flat_grad: Tensor  # [n], the gradient where `d` begins, negated to maximize
    prev_loss: Tensor  # float64 [], the value there, likewise
    n_iter: Tensor  # int64 [], inner iterations since init
    func_evals: Tensor  # int64 [], evaluations since init, including those of `grads` and `value`
    num_old: Tensor  # int64 [], pairs stored
