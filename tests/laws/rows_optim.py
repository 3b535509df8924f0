"""Cases of the transformation laws for `fdl.optim` and its schedules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from fdl import losses, optim, random, tree
from fdl.optim import schedules
from tests.laws.rows import Case, draw, weights


def optimizer(opt: optim.Optimizer) -> Case:
    """Init and two updates: the second one has something to remember."""

    def f(params: Any, grads: Any) -> Any:
        state = opt.init(params)
        first, state = opt.update(grads, state, params)
        return opt.update(tree.map(torch.sin, grads), state, optim.apply_updates(params, first))

    return Case(f, lambda key: (weights(key), weights(key + 1)), grads=(0, 1))


def small(opt: optim.Optimizer) -> Case:
    """The same for two numbers."""
    f = optimizer(opt).f
    return Case(f, lambda key: ({"w": draw(key, 2)}, {"w": draw(key + 1, 2)}), grads=(0, 1))


def with_value(opt: optim.Optimizer) -> Case:
    """Three updates, each with a value, as `train_step` passes it."""

    def f(params: Any, grads: Any, values: Tensor) -> Any:
        state = opt.init(params)
        for i, value in enumerate(values.unbind()):
            updates, state = opt.update(
                tree.map(lambda g, i=i: g / (i + 1), grads), state, params, value=value
            )
            params = optim.apply_updates(params, updates)
        return params, state

    return Case(f, lambda key: (weights(key), weights(key + 1), draw(key + 2, 3)), grads=(0, 1))


def minimizer(opt: optim.Optimizer) -> Case:
    """One update of an optimizer that evaluates the function itself; `target` shapes that."""

    def f(params: Any, target: Any) -> Any:
        def value_fn(params: Any) -> Tensor:
            pairs = zip(tree.leaves(params), tree.leaves(target), strict=True)
            return torch.stack([((p - t.sin()) ** 2).sum() + p.cos().sum() for p, t in pairs]).sum()

        grads, value = grad_and_value(value_fn)(params)
        return opt.update(grads, opt.init(params), params, value=value, value_fn=value_fn)

    return Case(f, lambda key: (weights(key), weights(key + 1)), grads=(0, 1))


def schedule(make: Callable[[Tensor], optim.Schedule]) -> Case:
    """A schedule at some count, differentiated by the value it is made with."""

    def inputs(key: Tensor) -> tuple[Tensor, ...]:
        one, two = random.split(key)
        return random.randint(one, (), 1, 9), draw(two).abs()

    return Case(lambda count, value: make(value)(count), inputs, grads=(1,))


def averages(params: Any, grads: Any) -> Any:
    opt = optim.schedule_free_sgd(0.1, momentum=0.5)
    updates, state = opt.update(grads, opt.init(params), params)
    return optim.schedule_free_params(state, optim.apply_updates(params, updates))


sgd = optim.sgd(0.1, momentum=0.9)
noise = optim.add_noise(random.key(3), 0.1)
# Zeros where there is no update, since a result must be a tree of tensors.
filled = optim.Optimizer(
    lambda params: (),
    lambda grads, state, params, **_: (
        tree.map(lambda g, p: torch.zeros_like(p) if g is None else g, grads, params),
        state,
    ),
)


OPTIM: dict[str, Case] = {
    "accumulate": with_value(optim.accumulate(sgd, 2)),
    "adaptive_grad_clip": optimizer(optim.adaptive_grad_clip(0.3)),
    "adan": optimizer(optim.adan(0.1, weight_decay=0.1)),
    "add_decayed_weights": optimizer(optim.add_decayed_weights(0.1, mask="*.weight")),
    "add_noise": Case(  # one update: draws are slow to compile
        lambda params, grads: noise.update(grads, noise.init(params), params),
        lambda key: (weights(key), weights(key + 1)),
        grads=(1,),
    ),
    "apply_if_finite": with_value(optim.apply_if_finite(sgd)),
    "apply_updates": Case(
        optim.apply_updates, lambda key: (weights(key), weights(key + 1)), grads=(0, 1)
    ),
    "centralize": optimizer(optim.centralize()),
    "chain": optimizer(optim.chain(optim.clip_by_global_norm(0.5), sgd)),
    "clip": optimizer(optim.clip(0.5)),
    "clip_by_global_norm": optimizer(optim.clip_by_global_norm(0.5)),
    "global_norm": Case(optim.global_norm, lambda key: (weights(key),)),
    "params_ema": optimizer(optim.chain(sgd, optim.params_ema(0.9))),
    "freeze": optimizer(optim.chain(optim.freeze(sgd, "fc.bias"), filled)),
    "hyperparams": Case(
        lambda params, lr: optim.hyperparams(optim.sgd(lr).init(params)),
        lambda key: (weights(key), draw(key).abs()),
        grads=(1,),
    ),
    "lamb": optimizer(optim.lamb(0.1, weight_decay=0.1, trust_mask="*.weight")),
    "lars": optimizer(optim.lars(0.1, weight_decay=0.1, trust_coefficient=0.5)),
    "lion": optimizer(optim.lion(0.1, weight_decay=0.1, mask="*.weight")),
    "lookahead": optimizer(optim.lookahead(sgd, 2)),
    "loss_scale": optimizer(optim.loss_scale(sgd, init=4.0, growth_interval=1)),
    "loss_scale_of": Case(
        lambda params: optim.loss_scale_of(optim.loss_scale(sgd).init(params)),
        lambda key: (weights(key),),
        grads=(),
    ),
    "masked": optimizer(optim.masked(sgd, "*.weight")),
    "multi_transform": optimizer(
        optim.multi_transform({"a": sgd, "b": optim.scale(-0.1)}, {"a": "*.weight", "b": "*.bias"})
    ),
    "reduce_on_plateau": with_value(optim.reduce_on_plateau(sgd, patience=0)),
    "sam": Case(
        lambda params, rho: optim.sam(rho, adaptive=True)(
            lambda p: (losses.l2_penalty(p) ** 2, p), has_aux=True
        )(params),
        lambda key: (weights(key), draw(key).abs()),
        grads=(0, 1),
    ),
    "scale": optimizer(optim.scale(-2.0)),
    "scale_by_adan": optimizer(optim.scale_by_adan()),
    "scale_by_learning_rate": optimizer(optim.scale_by_learning_rate(0.1)),
    "scale_by_lion": optimizer(optim.scale_by_lion()),
    "scale_by_trust_ratio": optimizer(optim.scale_by_trust_ratio(0.5, 0.1)),
    "schedule_free": optimizer(optim.schedule_free(0.1)),
    "schedule_free_adamw": optimizer(optim.schedule_free_adamw(0.1, weight_decay=0.1)),
    "schedule_free_params": Case(averages, lambda key: (weights(key), weights(key + 1)), (0, 1)),
    "schedule_free_sgd": optimizer(optim.schedule_free_sgd(0.1, maximize=True)),
    "sgd": optimizer(
        optim.sgd(schedules.step(0.1, step_size=1), 0.9, 0.2, weight_decay=0.1, maximize=True)
    ),
    "trace": optimizer(optim.trace(0.9, nesterov=True)),
    "with_hyperparams": Case(
        lambda params, lr: sgd.update(
            params, optim.with_hyperparams(sgd.init(params), lr=lr), params
        ),
        lambda key: (weights(key), draw(key).abs()),
        grads=(0, 1),
    ),
    # Rows of torch's optimizers: one small leaf, since each is compiled.
    "adadelta": small(optim.adadelta(weight_decay=0.1)),
    "adafactor": small(optim.adafactor(0.1, weight_decay=0.1)),
    "adagrad": small(optim.adagrad(0.1, 0.1, initial_accumulator_value=0.1)),
    "adam": small(optim.adam(0.1, amsgrad=True, maximize=True)),
    "adamax": small(optim.adamax(0.1)),
    "adamw": small(optim.adamw(0.1)),
    "asgd": small(optim.asgd(0.1, 0.1, t0=1)),
    "lbfgs": minimizer(optim.lbfgs(0.3, max_iter=2, history_size=2, line_search_fn="strong_wolfe")),
    "leafwise": small(
        optim.leafwise("half", lambda g, p, t, rate: (rate * g / t + p, {}), {"rate": 0.5})
    ),
    "nadam": small(optim.nadam(0.1)),
    "radam": small(optim.radam(0.1, (0.9, 0.9))),
    "rmsprop": small(optim.rmsprop(0.1, momentum=0.5, centered=True)),
    "rprop": small(optim.rprop(0.1)),
    "scale_by_adadelta": small(optim.scale_by_adadelta()),
    "scale_by_adagrad": small(optim.scale_by_adagrad()),
    "scale_by_adam": small(optim.scale_by_adam()),
    "scale_by_adamax": small(optim.scale_by_adamax()),
    "scale_by_nadam": small(optim.scale_by_nadam()),
    "scale_by_radam": small(optim.scale_by_radam()),
    "scale_by_rms": small(optim.scale_by_rms()),
    "slots": Case(
        lambda params, grads: optim.slots(sgd.update(grads, sgd.init(params), params)[1]),
        lambda key: (weights(key), weights(key + 1)),
        grads=(1,),
    ),
}

SCHEDULES: dict[str, Case] = {
    "by_epoch": schedule(lambda v: schedules.by_epoch(schedules.step(v, 2), 3)),
    "chained": schedule(
        lambda v: schedules.chained(v, schedules.step(1.0, 2), schedules.linear(1.0))
    ),
    "constant": schedule(lambda v: schedules.constant(v, 0.5, 4)),
    "cosine_annealing": schedule(lambda v: schedules.cosine_annealing(v, 3, 0.1)),
    "cosine_annealing_warm_restarts": schedule(
        lambda v: schedules.cosine_annealing_warm_restarts(v, 2, 2, 0.1)
    ),
    "cyclic": schedule(lambda v: schedules.cyclic(v, 2.0, 3, 2, "triangular2")),
    "cyclic_momentum": schedule(
        lambda v: schedules.cyclic_momentum(v, 0.9, 3, 2, "exp_range", 0.9)
    ),
    "exponential": schedule(lambda v: schedules.exponential(v, 0.9)),
    "join": schedule(lambda v: schedules.join([schedules.step(v, 2), schedules.linear(v)], [5])),
    "lambda_lr": schedule(lambda v: schedules.lambda_lr(v, lambda t: 0.9**t)),
    "linear": schedule(lambda v: schedules.linear(v, 0.5)),
    "multi_step": schedule(lambda v: schedules.multi_step(v, [2, 4, 4])),
    "multiplicative": schedule(lambda v: schedules.multiplicative(v, lambda t: 0.9 + t, 5)),
    "one_cycle": schedule(lambda v: schedules.one_cycle(v, 7, three_phase=True)),
    "one_cycle_momentum": schedule(lambda v: schedules.one_cycle_momentum(20, v)),
    "polynomial": schedule(lambda v: schedules.polynomial(v, 9, 2.0)),
    "step": schedule(lambda v: schedules.step(v, 2)),
    "swa_anneal": schedule(lambda v: schedules.swa_anneal(schedules.step(v, 2), 0.1, 3, 4)),
    "warmup_cosine": schedule(lambda v: schedules.warmup_cosine(v, 3, 9, 0.1)),
    "warmup_stable_decay": schedule(lambda v: schedules.warmup_stable_decay(v, 3, 2, 4, 0.1)),
}
