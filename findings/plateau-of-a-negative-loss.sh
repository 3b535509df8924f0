#!/usr/bin/env bash
# torch 2.15.0 and optax 0.2.8: a learning rate that should fall when the loss stands still never falls if
# the loss is negative, as log-likelihoods, ELBOs and rewards are. 'Better by 1e-4, relatively' is
# computed as best · (1 − 1e-4), which for −10 is −9.999: a step backwards, so −10 improves on −10.
# In torch, threshold_mode="abs" avoids it; in optax, rtol=0 with atol.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 optax==0.2.8 jax==0.10.2 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import jax.numpy as jnp
import torch
from optax.contrib import reduce_on_plateau


def by_torch(loss):
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.1, patience=2, threshold=1e-4)
    for _ in range(20):
        schedule.step(loss)
    return opt.param_groups[0]["lr"]


def by_optax(loss):
    schedule = reduce_on_plateau(factor=0.1, patience=2, rtol=1e-4)
    state = schedule.init(jnp.zeros(1))
    for _ in range(20):
        _, state = schedule.update(jnp.zeros(1), state, value=loss)
    return float(state.scale)


for loss in (10.0, -10.0):
    rates = by_torch(loss), by_optax(loss)
    print(f"loss {loss:+.0f} for 20 steps: rate by torch {rates[0]:.0e}, by optax {rates[1]:.0e}")
    assert all((rate < 0.1) == (loss > 0) for rate in rates), "one of them has changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
