"""A power method and factorisations: QR, eigenvalues, singular values, exponentials, norms."""

from __future__ import annotations

import torch
from torch import linalg

from fdl import random
from tests.support.programs import Program


def step(basis, matrix):
    symmetric = matrix + matrix.mT + torch.diag(torch.arange(4.0, dtype=torch.float64))
    basis, upper = linalg.qr(symmetric @ basis)
    signs = torch.sign(upper.diagonal())
    basis = basis * signs
    rotation = torch.matrix_exp(0.1 * (matrix - matrix.mT))
    spectrum = linalg.eigvalsh(symmetric)
    vectors = linalg.eigh(symmetric).eigenvectors.abs()
    inverse = linalg.pinv(matrix[:, :2])
    return rotation @ basis, {
        "spectrum": spectrum,
        "singular": linalg.svdvals(matrix),
        "vectors": vectors,
        "inverse": inverse,
        "norms": (linalg.norm(matrix, 2), linalg.matrix_norm(matrix, "nuc"), linalg.det(matrix)),
        "power": linalg.matrix_power(matrix, 3) + linalg.multi_dot([matrix, basis, basis.mT]),
    }


def init():
    return torch.eye(4, dtype=torch.float64)[:, :2]


def xs():
    return random.normal(random.key(0), (4, 4, 4), torch.float64)


PROGRAM = Program(step, init, xs, rtol=1e-7, atol=1e-9)
