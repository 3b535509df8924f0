"""A sweep with pruning: every trial runs the same program, whose rate is in the state."""

import optuna
import torch

import fdl
from fdl import losses, nn, optim, random

model, opt = nn.linear(4, 1), optim.sgd(0.1)
step = fdl.jit(fdl.train_step(fdl.supervised(model, losses.mse), opt))
batch = random.normal(random.key(1), (32, 4)), torch.ones(32, 1)


# Recipe
def objective(trial):
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    rate = trial.suggest_float("lr", 1e-3, 1)
    state = state._replace(opt_state=optim.with_hyperparams(state.opt_state, lr=rate))
    for i in range(20):
        state, metrics = step(state, batch)
        trial.report(metrics["loss"].value, i)
        if trial.should_prune():
            raise optuna.TrialPruned
    return metrics["loss"].value


# Check
study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
study.optimize(objective, n_trials=10)
assert len(study.trials) == 10 and study.best_value < 1e-6 and len(step.report()) == 1
