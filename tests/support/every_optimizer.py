"""One or more of every optimizer and transformation of `fdl.optim`, for laws that all keep."""

from typing import Any

import torch

from fdl import optim, random, tree

# Public names that are neither optimizers nor transformations.
OTHERS = {
    *("Optimizer", "Schedule", "State", "apply_updates", "from_torch", "global_norm"),
    *("loss_scale_of", "sam", "schedule_free_params", "schedules", "slots", "to_torch"),
    *("hyperparams", "with_hyperparams"),
}

_inner = optim.sgd(0.1, momentum=0.9, weight_decay=0.1)

# For matrices "w" [2, 3], vectors "b" [2] and, where they may, scalars.
EVERY: dict[str, optim.Optimizer] = {
    "accumulate": optim.accumulate(_inner, 2),
    "adadelta": optim.adadelta(0.1, weight_decay=0.1),
    "adafactor": optim.adafactor(0.1, weight_decay=0.1),
    "adagrad": optim.adagrad(0.1, 0.1),
    "adam": optim.adam(0.1),
    "adam-amsgrad": optim.adam(0.1, amsgrad=True, weight_decay=0.1),
    "adamax": optim.adamax(0.1),
    "adamw": optim.adamw(0.1),
    "adan": optim.adan(0.1, weight_decay=0.1),
    "adaptive_grad_clip": optim.adaptive_grad_clip(0.1),
    "add_decayed_weights": optim.add_decayed_weights(0.1),
    "add_noise": optim.add_noise(random.key(0), 0.01),
    "apply_if_finite": optim.apply_if_finite(_inner),
    "asgd": optim.asgd(0.1, 0.1, t0=1),
    "centralize": optim.centralize(),
    "chain": optim.chain(optim.clip_by_global_norm(0.1), optim.adam(0.1), optim.params_ema(0.9)),
    "clip": optim.clip(0.5),
    "clip_by_global_norm": optim.clip_by_global_norm(0.5),
    "params_ema": optim.params_ema(0.9),
    "params_ema-buffers": optim.params_ema(0.9, buffers=True),
    "freeze": optim.freeze(_inner, "b"),
    "lamb": optim.lamb(0.1, weight_decay=0.1),
    "lars": optim.lars(0.1, weight_decay=0.1, trust_coefficient=0.5),
    "lbfgs": optim.lbfgs(0.3, max_iter=2, history_size=2),
    "lbfgs-search": optim.lbfgs(max_iter=2, history_size=2, line_search_fn="strong_wolfe"),
    "leafwise": optim.leafwise(
        "heavy",
        lambda g, p, t, m, beta1: (-beta1 * m - g, {"m": beta1 * m + g}),
        {"beta1": 0.9},
        {"m": torch.zeros_like},
    ),
    "lion": optim.lion(0.1, weight_decay=0.1),
    "lookahead": optim.lookahead(_inner, 2),
    "loss_scale": optim.loss_scale(_inner, init=4.0),
    "masked": optim.masked(_inner, "w"),
    "multi_transform": optim.multi_transform(
        {"a": _inner, "b": optim.adam(0.1)}, {"a": "w", "b": "b"}
    ),
    "muon": optim.multi_transform({"a": optim.muon(0.1), "b": _inner}, {"a": "w", "b": "b"}),
    "nadam": optim.nadam(0.1),
    "radam": optim.radam(0.1, (0.9, 0.9)),
    "reduce_on_plateau": optim.reduce_on_plateau(_inner, patience=0),
    "rmsprop": optim.rmsprop(0.1, momentum=0.5),
    "rmsprop-centered": optim.rmsprop(0.1, centered=True),
    "rprop": optim.rprop(0.1),
    "scale": optim.scale(-0.3),
    "scale_by_adadelta": optim.scale_by_adadelta(),
    "scale_by_adagrad": optim.scale_by_adagrad(),
    "scale_by_adam": optim.scale_by_adam(),
    "scale_by_adamax": optim.scale_by_adamax(),
    "scale_by_adan": optim.scale_by_adan(),
    "scale_by_learning_rate": optim.scale_by_learning_rate(0.1),
    "scale_by_lion": optim.scale_by_lion(),
    "scale_by_muon": optim.masked(optim.scale_by_muon(), "w"),
    "scale_by_nadam": optim.scale_by_nadam(),
    "scale_by_radam": optim.scale_by_radam(),
    "scale_by_rms": optim.scale_by_rms(),
    "scale_by_trust_ratio": optim.scale_by_trust_ratio(0.5),
    "schedule_free": optim.schedule_free(0.1),
    "schedule_free_adamw": optim.schedule_free_adamw(0.1, weight_decay=0.1),
    "schedule_free_sgd": optim.schedule_free_sgd(0.1, weight_decay=0.1),
    "sgd": optim.sgd(0.1, 0.9, 0.2, weight_decay=0.1),
    "trace": optim.trace(0.9, nesterov=True),
}

missing = set(optim.__all__) - OTHERS - {name.partition("-")[0] for name in EVERY}
assert not missing, f"give these a row, so that the laws hold for them as well: {missing}"


def moved(opt: optim.Optimizer, params: Any) -> Any:
    """The parameters after two updates with the gradient 0.1 w + 1."""

    def loss(params: Any) -> torch.Tensor:
        return torch.stack([(0.05 * p**2 + p).sum() for p in tree.leaves(params)]).sum()

    state = opt.init(params)
    for _ in range(2):
        grads = tree.map(lambda p: 0.1 * p + 1, params)
        extra = {"value": loss(params), "value_fn": loss}
        updates, state = opt.update(grads, state, params, **extra)
        params = optim.apply_updates(params, updates)
    return params
