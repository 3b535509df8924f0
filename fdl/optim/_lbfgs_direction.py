"""The inverse Hessian of `lbfgs`: its history, and the direction computed from it.

Algorithm 7.4 of Nocedal & Wright, Numerical Optimization, 2nd ed., 2006.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fdl.optim._helpers import where_lazy
from fdl.optim._lbfgs_state import LBFGSState

LEAST_CURVATURE = 1e-10  # lower bound of y · s for a pair to be stored, as in torch


def products(state: LBFGSState) -> Tensor:
    """Multiply each s_i by each y_j: float64 [m, m]; only those with i < j are ever read.

    >>> from fdl import optim
    >>> products(optim.lbfgs(history_size=2).init({"w": torch.ones(3)}))
    tensor([[0., 0.],
            [0., 0.]], dtype=torch.float64)
    """
    return (state.old_stps @ state.old_dirs.T).double()


def remember(state: LBFGSState, above: Tensor, g: Tensor) -> tuple[LBFGSState, Tensor]:
    """Push the last step onto the histories, if its curvature is large enough."""
    y, s = g - state.prev_flat_grad, state.t.to(g.dtype) * state.d
    curvature = y @ s
    enters = curvature > LEAST_CURVATURE

    def pushed() -> tuple[LBFGSState, Tensor]:
        # Under `grad` values that are not selected must be finite too.
        safe, square = (torch.where(enters, x, 1) for x in (curvature, y @ y))
        column = (state.old_stps[1:] @ y).double()
        shifted = torch.cat([above[1:, 1:], column[:, None]], dim=1)
        return state._replace(
            old_dirs=_push(state.old_dirs, y),
            old_stps=_push(state.old_stps, s),
            ro=_push(state.ro, 1 / safe),
            H_diag=safe / square,
            num_old=(state.num_old + 1).clamp(max=len(state.ro)),
        ), pad(shifted, (0, 0, 0, 1))

    return where_lazy(enters, pushed, (state, above))


def _push(history: Tensor, newest: Tensor) -> Tensor:
    return torch.cat([history[1:], newest[None]])


def direction(state: LBFGSState, above: Tensor, g: Tensor) -> Tensor:
    """Apply the inverse Hessian to −g: the two loops as two triangular systems.

    The first loop has alpha_i = ro_i s_i · (q − sum over j > i of alpha_j y_j), the second, with
    gamma = alpha − beta, gamma_i = alpha_i − ro_i y_i · (r + sum over j < i of gamma_j s_j): both
    need no more than the products s_i · y_j for i < j.
    """
    ro, q = state.ro.double(), -g
    alpha = _solve(ro[:, None] * above, ro * (state.old_stps @ q), upper=True)
    r = state.H_diag * (q - alpha.to(g.dtype) @ state.old_dirs)
    gamma = _solve((ro * above).T, alpha - ro * (state.old_dirs @ r), upper=False)
    return r + gamma.to(g.dtype) @ state.old_stps


def _solve(matrix: Tensor, vector: Tensor, *, upper: bool) -> Tensor:
    """Solve (1 + triangle) x = vector, for the part of the matrix above or below its diagonal."""
    column = vector[:, None]
    return torch.linalg.solve_triangular(matrix, column, upper=upper, unitriangular=True)[:, 0]
