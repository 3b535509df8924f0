"""`python -m train bench`: fdl against every peer, on the same work, each in its own process.

workloads   what is trained, and the arrays that every runner is given
runner         what a runner of training has to offer; registry lists them all
fdl_runners, torch_peers, jax_peers   the runners
worker      the process that one runner runs in; client is the coordinator's end of it
reference   the same training in float64, which the runners are checked against
check       are the losses and the distances moved those of the reference?
rates       how fast this machine multiplies matrices and copies memory: the floor
measure     the coordinator; record makes its figures, render shows them
"""
