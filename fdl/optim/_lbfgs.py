"""L-BFGS as a pure function.

Nocedal & Wright, Numerical Optimization, 2nd ed., 2006: algorithms 7.4 (the direction), 7.5 (the
method), 3.5 and 3.6 (the line search, in `_line_search.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad_and_value

from fdl import tree
from fdl._checks import check_number
from fdl._compiler._scan import scan
from fdl._modes import is_eager
from fdl.optim._base import Optimizer, in_32_bits, upcast
from fdl.optim._helpers import check_whole, tree_where, where_lazy
from fdl.optim._hyperparams import (
    AT_LEAST_0,
    ScalarOrSchedule,
    check_rate,
    init_hyper,
    next_hyper,
    rates_now,
)
from fdl.optim._lbfgs_direction import direction, products, remember
from fdl.optim._lbfgs_state import LBFGSState
from fdl.optim._line_search import Point, Search, Verdict, judge, start
from fdl.tree import Tree
from fdl.tree._map import match
from fdl.tree._summary import dtype_name


class _Task(NamedTuple):
    """The constants of an update."""

    max_iter: int
    max_eval: int
    tolerance_grad: float
    tolerance_change: float
    searches: bool
    objective: Callable[[Tensor], Tensor]  # [n] -> [], to be minimized
    moves: Tensor  # bool [n], False where the gradient is None
    rate: Tensor  # float64 []
    n_iter: Tensor  # int64 [], before this update
    func_evals: Tensor  # int64 [], likewise


class _Walk(NamedTuple):
    """The variables of an update that the next update does not need."""

    x: Tensor  # [n], where the inner iteration began
    products: Tensor  # float64 [m, m], s_i · y_j above the diagonal
    search: Search  # unused if every step is accepted
    done: Tensor  # bool [], True once nothing changes any more


def lbfgs(
    lr: ScalarOrSchedule = 1.0,
    max_iter: int = 20,
    max_eval: int | None = None,
    tolerance_grad: float = 1e-7,
    tolerance_change: float = 1e-9,
    history_size: int = 100,
    line_search_fn: str | None = None,
    *,
    maximize: bool = False,
) -> Optimizer:
    """L-BFGS; an update equals a `step(closure)` of `torch.optim.LBFGS`, up to rounding.

    An update is a whole minimization of up to `max_iter` inner iterations x ← x + t · d. In each
    d = −H g, where H is the inverse Hessian that BFGS builds from the last m = `history_size` pairs
    s = Δx, y = Δg with y · s > 0, starting from γI with γ = y · s / y · y. t is `lr`, in the very
    first iteration at most `lr` / ‖g‖₁; with a line search it is the first trial.

    `update` needs `value_fn`, which it evaluates and differentiates; `train_step` passes it.
    `grads`, and `value` if given, count as the first evaluation. A leaf whose gradient is `None` is
    constant in this update, and its update is `None`.

    Called eagerly, an update returns as soon as a tolerance is met. Compiled, vmapped or
    differentiated it is one program without branches, which always makes `max_eval` evaluations;
    those after the end change nothing. `jit` compiles one evaluation, as the body of a `scan`; a
    `torch.func` transformation, or parameters that require gradients, unroll all of them, which is
    slow to compile: choose a smaller `max_iter` there. The state holds 2 m n numbers from the
    start.

    A line search treats a value that is not finite, or whose gradient is not, as too high: it stays
    within the domain of the function, which torch's may leave. An update that starts outside the
    domain changes nothing.

    On ill-conditioned or non-convex problems this and torch diverge as fast as two runs of torch
    whose starts differ by one ulp.

    Args:
        lr: a number, a 0-d tensor or a schedule over updates (not inner iterations).
        max_iter: inner iterations per update.
        max_eval: evaluations per update, 1.25 `max_iter` if None; a line search may make one more.
        tolerance_grad: stop when no component of the gradient is larger.
        tolerance_change: stop when no parameter changes by more, or the value changes by less.
        history_size: m, number of pairs stored.
        line_search_fn: `"strong_wolfe"`, or None for a fixed step.
        maximize: maximize the objective instead.

    Raises:
        ValueError: a number out of range or an unknown line search; (at init) leaves of several
            dtypes (each path is listed); (at update) no `value_fn`.

    >>> from fdl import optim
    >>> def rosenbrock(p):
    ...     return 100 * (p["y"] - p["x"] ** 2) ** 2 + (1 - p["x"]) ** 2
    >>> opt = optim.lbfgs(max_iter=50, line_search_fn="strong_wolfe")
    >>> params = {"x": torch.tensor(-1.2), "y": torch.tensor(1.0)}
    >>> grads, value = grad_and_value(rosenbrock)(params)
    >>> updates, state = opt.update(
    ...     grads, opt.init(params), params, value=value, value_fn=rosenbrock)
    >>> optim.apply_updates(params, updates)
    {'x': tensor(1.0000), 'y': tensor(1.0000)}
    """
    check_rate("lbfgs", "lr", lr)
    check_whole("lbfgs", "max_iter", max_iter, least=1)
    max_eval = max_iter * 5 // 4 if max_eval is None else max_eval
    check_whole("lbfgs", "max_eval", max_eval, least=1)
    check_whole("lbfgs", "history_size", history_size, least=1)
    for name, least in [("tolerance_grad", tolerance_grad), ("tolerance_change", tolerance_change)]:
        check_number("lbfgs", name, least, *AT_LEAST_0)
    if line_search_fn not in (None, "strong_wolfe"):
        raise ValueError(
            f'lbfgs: line_search_fn must be "strong_wolfe" or None, got {line_search_fn!r}'
        )
    rates = {"lr": lr}
    searches = line_search_fn is not None
    # Evaluations after the first. Without a search the last inner iteration needs none; with one,
    # a search that begins when one evaluation is left may use two.
    turns = max_eval if searches else min(max_iter, max(max_eval, 2)) - 1

    def init(params: Tree) -> LBFGSState:
        x = _flatten(params)
        count, scalar = (x.new_zeros((), dtype=dtype) for dtype in (torch.int64, torch.float64))
        return LBFGSState(
            init_hyper(rates, params),
            d=torch.zeros_like(x),
            t=scalar,
            old_dirs=x.new_zeros(history_size, len(x)),
            old_stps=x.new_zeros(history_size, len(x)),
            ro=x.new_zeros(history_size),
            H_diag=x.new_ones(()),
            prev_flat_grad=torch.zeros_like(x),
            prev_loss=scalar.clone(),
            n_iter=count,
            func_evals=count.clone(),
            num_old=count.clone(),
        )

    def update(
        grads: Tree,
        state: LBFGSState,
        params: Tree,
        *,
        value: Any = None,
        value_fn: Any = None,
        **extra: Any,
    ) -> tuple[Tree, LBFGSState]:
        if value_fn is None:
            raise ValueError(
                "lbfgs: update needs the loss as a function, update(grads, state, params, "
                "value_fn=params -> value), as train_step passes it"
            )
        matched = match(params, grads, "lbfgs: grads")
        x, leaves = _flatten(params), tree.leaves(params)
        pairs = list(zip(matched, leaves, strict=True))
        hyper, sign = state.hyper, -1 if maximize else 1
        task = _Task(
            max_iter,
            max_eval,
            tolerance_grad,
            tolerance_change,
            searches,
            objective=lambda x: sign * value_fn(_unflatten(x, params, matched, leaves)),
            moves=_join(torch.full_like(p, g is not None, dtype=torch.bool) for g, p in pairs),
            rate=rates_now(rates, hyper)["lr"],
            n_iter=state.n_iter,
            func_evals=state.func_evals,
        )
        f = sign * torch.as_tensor(value_fn(params) if value is None else value).double()
        g = sign * _join(torch.zeros_like(p) if g is None else g.to(p.dtype) for g, p in pairs)
        end, state = _minimize(task, tree.map(upcast, state), x, f, g, turns)
        updates = _unflatten(end - x, params, matched, [None] * len(matched))
        # A new tuple, since Dynamo of torch 2.11 cannot return the result of _replace.
        return updates, LBFGSState(next_hyper(rates, hyper), *state[1:])

    return in_32_bits(init, update)


# ------------------------------------------------------------------------------ the method


def _minimize(
    task: _Task, state: LBFGSState, x: Tensor, f: Tensor, g: Tensor, turns: int
) -> tuple[Tensor, LBFGSState]:
    """Minimize for one update from x, where the value is f and the gradient g."""
    walk = _Walk(x, products(state), start(f, f, g), done=g.abs().amax() <= task.tolerance_grad)
    state = state._replace(func_evals=state.func_evals + 1)
    carry = where_lazy(~walk.done, lambda: _begin(task, state, walk, f, g), (state, walk))
    state, walk = _repeat(lambda carry: _turn(task, *carry), carry, turns)
    if task.searches:
        return walk.x, state
    return torch.where(walk.done, walk.x, _along(walk.x, state.t, state.d)), state


Carry = tuple[LBFGSState, _Walk]


def _repeat(turn: Callable[[Carry], Carry], carry: Carry, turns: int) -> Carry:
    eager = is_eager()
    # A compiled scan cannot be differentiated from outside.
    if eager or not turns or any(leaf.requires_grad for leaf in tree.leaves(carry)):
        for _ in range(turns):
            if eager and carry[1].done:
                break
            carry = turn(carry)
        return carry
    return scan(lambda carry, _: (turn(carry), ()), carry, length=turns)[0]


def _begin(task: _Task, state: LBFGSState, walk: _Walk, f: Tensor, g: Tensor) -> Carry:
    """Begin an inner iteration where the value is f and the gradient g."""
    state, above = remember(state, walk.products, g)
    d = torch.where(task.moves, direction(state, above, g), 0)
    shrink = 1 / g.abs().sum(dtype=torch.float64).clamp(min=1)
    t = task.rate * torch.where(state.n_iter == 0, shrink, 1)
    slope = (g @ d).double()
    state = state._replace(d=d, t=t, prev_flat_grad=g, prev_loss=f, n_iter=state.n_iter + 1)
    done = ~(slope <= -task.tolerance_change) | ~torch.isfinite(slope)
    return state, _Walk(walk.x, above, start(f, slope, g), done)


def _turn(task: _Task, state: LBFGSState, walk: _Walk) -> Carry:
    """Evaluate one trial; if it ends an inner iteration, begin the next one or stop."""
    before, live = (state, walk), ~walk.done
    trial = _evaluate(task, state, torch.where(live, _along(walk.x, state.t, state.d), walk.x))
    state = state._replace(func_evals=state.func_evals + 1)
    search, ended, best, t = _judge(task, state, walk.search, trial)
    t = torch.where(ended, best.t, t)
    x = torch.where(ended, _along(walk.x, t, state.d), walk.x)
    stops = _meets_a_limit(task, state, best, t)
    after = state._replace(t=t), _Walk(x, walk.products, search, ended & stops)
    state, walk = tree_where(live, after, before)
    begins = live & ended & ~stops
    return where_lazy(begins, lambda: _begin(task, state, walk, best.f, best.g), (state, walk))


def _evaluate(task: _Task, state: LBFGSState, x: Tensor) -> Point:
    g, f = grad_and_value(task.objective)(x)
    return Point(state.t, f.double(), (g @ state.d).double(), g)


def _judge(task: _Task, state: LBFGSState, search: Search, trial: Point) -> Verdict:
    """Judge a trial; without a line search every one is accepted."""
    if not task.searches:
        return Verdict(search, torch.ones_like(trial.t, dtype=torch.bool), trial, trial.t)
    last = state.func_evals - task.func_evals > task.max_eval
    return judge(search, trial, width=state.d.abs().amax().double(), last=last)


def _meets_a_limit(task: _Task, state: LBFGSState, best: Point, t: Tensor) -> Tensor:
    """Test if an inner iteration that ends at `best` is the last one of this update (bool [])."""
    return (
        (state.n_iter - task.n_iter >= task.max_iter)
        | (state.func_evals - task.func_evals >= task.max_eval)
        | (best.g.abs().amax() <= task.tolerance_grad)
        | ((t * state.d).abs().amax() <= task.tolerance_change)
        | ((best.f - state.prev_loss).abs() < task.tolerance_change)
    )


def _along(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
    return x + t.to(x.dtype) * d


# ------------------------------------------------------------------------------ flat vectors


def _flatten(params: Tree) -> Tensor:
    """Concatenate the leaves."""
    flat = tree.flatten_dict(params)
    dtypes = {leaf.dtype for leaf in flat.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        lines = [f"{path}: {dtype_name(leaf.dtype)}" for path, leaf in flat.items()]
        raise ValueError(
            "lbfgs: params must share one floating dtype, as they form one vector, got:\n  "
            + "\n  ".join(lines)
        )
    if not sum(leaf.numel() for leaf in flat.values()):
        raise ValueError("lbfgs: params must have at least one element, got none")
    return _join(flat.values())


def _join(leaves: Iterable[Tensor]) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def _unflatten(x: Tensor, params: Tree, grads: Sequence[Any], constant: Sequence[Any]) -> Tree:
    """Split a vector into leaves; where the gradient is `None`, use the leaf of `constant`."""
    leaves, spec = pytree.tree_flatten(params)
    parts = x.split([leaf.numel() for leaf in leaves])
    rows = zip(parts, leaves, grads, constant, strict=True)
    return pytree.tree_unflatten(
        [other if g is None else part.view(leaf.shape) for part, leaf, g, other in rows], spec
    )
