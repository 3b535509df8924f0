"""`python -m train bench`: time fdl and its peers on the same work, each in its own process.

workloads   the recipes to train; task is a recipe as arrays, equal for every runner
runner      the interface of a runner, one way to train a task; registry lists them all
fdl_runners, torch_peers, jax_peers   the runners
worker      the process of one runner; client is the coordinator's end of it
reference   the same training in float64
check       compare losses and movements of parameters with the reference
rates       matrix products and copies per second on this machine, for the floor
measure     the coordinator; record computes the figures, render and chart show them
start       the process of one start, for speed_starts
gpu         `make gpu`; gpu_parts are its commands, gpu_report what it writes
kernels     the kernels of a step; kernels_for_cuda counts them without a GPU
"""
