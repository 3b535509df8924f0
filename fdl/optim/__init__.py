"""Optimizers and transformations of gradients as pure functions."""

from __future__ import annotations

from fdl._numerics import global_norm
from fdl.optim import schedules
from fdl.optim._adafactor import adafactor
from fdl.optim._adan import adan, scale_by_adan
from fdl.optim._adaptive import (
    scale_by_adadelta,
    scale_by_adagrad,
    scale_by_adam,
    scale_by_adamax,
    scale_by_nadam,
    scale_by_radam,
    scale_by_rms,
)
from fdl.optim._averaging import lookahead, params_ema
from fdl.optim._base import Optimizer, State, apply_updates, slots
from fdl.optim._basic import (
    add_decayed_weights,
    add_noise,
    centralize,
    scale,
    scale_by_learning_rate,
    trace,
)
from fdl.optim._clipping import adaptive_grad_clip, clip, clip_by_global_norm
from fdl.optim._conditional import accumulate, apply_if_finite
from fdl.optim._hyperparams import Schedule, hyperparams, with_hyperparams
from fdl.optim._layerwise import lamb, lars, scale_by_trust_ratio
from fdl.optim._lbfgs import lbfgs
from fdl.optim._leafwise import chain, leafwise
from fdl.optim._lion import lion, scale_by_lion
from fdl.optim._loss_scale import loss_scale, loss_scale_of
from fdl.optim._masking import freeze, masked, multi_transform
from fdl.optim._muon import muon, scale_by_muon
from fdl.optim._reduce_on_plateau import reduce_on_plateau
from fdl.optim._rprop_asgd import asgd, rprop
from fdl.optim._sam import sam
from fdl.optim._schedule_free import (
    schedule_free,
    schedule_free_adamw,
    schedule_free_params,
    schedule_free_sgd,
)
from fdl.optim._torch_recipes import (
    adadelta,
    adagrad,
    adam,
    adamax,
    adamw,
    nadam,
    radam,
    rmsprop,
    sgd,
)
from fdl.optim._torch_state import from_torch, to_torch

__all__ = [
    "Optimizer",
    "Schedule",
    "State",
    "accumulate",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "adan",
    "adaptive_grad_clip",
    "add_decayed_weights",
    "add_noise",
    "apply_if_finite",
    "apply_updates",
    "asgd",
    "centralize",
    "chain",
    "clip",
    "clip_by_global_norm",
    "freeze",
    "from_torch",
    "global_norm",
    "hyperparams",
    "lamb",
    "lars",
    "lbfgs",
    "leafwise",
    "lion",
    "lookahead",
    "loss_scale",
    "loss_scale_of",
    "masked",
    "multi_transform",
    "muon",
    "nadam",
    "params_ema",
    "radam",
    "reduce_on_plateau",
    "rmsprop",
    "rprop",
    "sam",
    "scale",
    "scale_by_adadelta",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_adan",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_muon",
    "scale_by_nadam",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_trust_ratio",
    "schedule_free",
    "schedule_free_adamw",
    "schedule_free_params",
    "schedule_free_sgd",
    "schedules",
    "sgd",
    "slots",
    "to_torch",
    "trace",
    "with_hyperparams",
]
