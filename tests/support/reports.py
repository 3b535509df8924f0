"""What steps of training are asked to report of themselves."""

from fdl import optim


def report(state, grads):
    return {
        "grad_norm": optim.global_norm(grads),
        "weight_norm": optim.global_norm(state.params),
        "lr": optim.hyperparams(state.opt_state)["lr"],
    }
