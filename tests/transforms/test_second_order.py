"""Second and third derivatives of torch's functions equal differences, and are finite at 0."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

import fdl
from fdl import population, random, transforms, tree
from fdl.transforms import gnvp, hessian, hutchinson_trace, hvp
from tests.support.asserts import draw

ROWS = torch.tensor([0, 2, 1, 2])
LABELS = torch.tensor([0, 1, 2])
MASK = draw(90, 4, 4)
ZEROS = torch.zeros(4, 4, dtype=torch.float64)


def definite(x: Tensor) -> Tensor:
    return x @ x.mT + 2 * torch.eye(x.shape[-1], dtype=x.dtype)


def norm_with_parameters(norm: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """The last two rows are scale and shift."""
    return lambda x: norm(x[:-2], weight=x[-2], bias=x[-1])


def attend(x: Tensor, **options: object) -> Tensor:
    return F.scaled_dot_product_attention(x[0], x[1], x[2], **options)


def heads(x: Tensor, need_weights: bool) -> Tensor:
    q = x[:3, None]
    return F.multi_head_attention_forward(
        q, q, q, 4, 2, x[3:15], None, None, None, False, 0.0, x[15:19], None,
        need_weights=need_weights,
    )[0]  # fmt: skip


def gru(x: Tensor) -> Tensor:
    parts = [x[3:12], x[12:21], x[21:24].flatten(), x[24:27].flatten()]
    return torch.gru(x[None, :2], x[None, 2:3], parts, True, 1, 0.0, False, False, True)[0]


def lstm(x: Tensor) -> Tensor:
    parts = [x[4:16], x[16:28], x[28:32].flatten(), x[32:36].flatten()]
    hx = (x[None, 2:3], x[None, 3:4])
    return torch.lstm(x[None, :2], hx, parts, True, 1, 0.0, False, False, True)[0]


def sampled(x: Tensor, mode: str) -> Tensor:
    grid = x[:, 1:].permute(0, 2, 3, 1).tanh() * 0.7
    return F.grid_sample(x[:, :1], grid, mode=mode, align_corners=False)


def plain(f: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    return f, (3, 4)


def square(f: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    return f, (3, 3)


def image(f: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    return f, (1, 1, 4, 4)


def pair(f: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable, tuple[int, ...]]:
    return lambda x: f(x[0], x[1]), (2, 3, 4)


# The functions that models and losses consist of, and the shapes of their arguments.
FUNCTIONS = {
    # normalisation
    "layer_norm": plain(lambda x: F.layer_norm(x, (4,))),
    "layer_norm, scaled": (
        norm_with_parameters(lambda x, weight, bias: F.layer_norm(x, (4,), weight, bias)), (5, 4)),
    "rms_norm": plain(lambda x: F.rms_norm(x, (4,))),
    "batch_norm": ((lambda x: F.batch_norm(x, None, None, training=True)), (5, 3)),
    "batch_norm, scaled": (
        norm_with_parameters(lambda x, **p: F.batch_norm(x, None, None, training=True, **p)),
        (6, 3)),
    "batch_norm of images": (
        lambda x: F.batch_norm(x, None, None, training=True), (2, 2, 2, 3)),
    "batch_norm, evaluated": (
        lambda x: F.batch_norm(x, ZEROS[0], ZEROS[0] + 2), (3, 4)),
    "group_norm": (lambda x: F.group_norm(x, 2), (2, 4, 3)),
    "instance_norm": (lambda x: F.instance_norm(x), (2, 2, 4)),
    "local_response_norm": (lambda x: F.local_response_norm(x, 3), (2, 4, 3)),
    "normalize": plain(lambda x: F.normalize(x, dim=1)),
    "weight_norm": ((lambda x: torch._weight_norm(x[:3], x[3:].mT[:3], 0)), (4, 3)),
    # attention
    "attention": (attend, (3, 1, 2, 4, 3)),
    "attention, causal": (lambda x: attend(x, is_causal=True), (3, 1, 2, 4, 3)),
    "attention, masked": (lambda x: attend(x, attn_mask=MASK), (3, 1, 2, 4, 3)),
    "multi-head attention": (lambda x: heads(x, False), (19, 4)),
    "multi-head attention with weights": (lambda x: heads(x, True), (19, 4)),
    # distances
    "cdist": (lambda x: torch.cdist(x, x[:3] + 1), (5, 3)),
    "cdist, p=1": (lambda x: torch.cdist(x, x[:3] + 1, p=1.0), (5, 3)),
    "cdist, p=3": (lambda x: torch.cdist(x, x[:3] + 1, 3.0), (5, 3)),
    "cdist, p=inf": (lambda x: torch.cdist(x, x[:3] + 1, p=torch.inf), (5, 3)),
    "cdist by products": (
        lambda x: torch.cdist(x, x[:3] + 1, compute_mode="use_mm_for_euclid_dist"), (5, 3)),
    "cdist of batches": (lambda x: torch.cdist(x[0], x[1]), (2, 2, 3, 2)),
    "RBF kernel": (lambda x: (-torch.cdist(x, x).square() / 2).exp(), (4, 3)),
    "pdist": (F.pdist, (4, 3)),
    "pairwise_distance": pair(F.pairwise_distance),
    "cosine_similarity": pair(F.cosine_similarity),
    "norm": plain(lambda x: torch.linalg.vector_norm(x, dim=1)),
    "norm, p=3": plain(lambda x: torch.linalg.norm(x, 3, dim=1)),
    # reductions
    "logsumexp": plain(lambda x: x.logsumexp(1)),
    "softmax": plain(lambda x: x.softmax(1)),
    "log_softmax": plain(lambda x: x.log_softmax(1)),
    "var_mean": plain(lambda x: torch.cat(torch.var_mean(x, 1))),
    "std": plain(lambda x: x.std(1)),
    "prod": plain(lambda x: x.prod(1)),
    "prod with a 0": plain(lambda x: (x * torch.tensor([1, 0, 1, 1])).prod(1)),
    "cumprod": plain(lambda x: x.cumprod(1)),
    "logcumsumexp": plain(lambda x: x.logcumsumexp(1)),
    "amax": plain(lambda x: x.amax(1).square()),
    "sort": plain(lambda x: x.sort(1).values * x),
    "topk": plain(lambda x: x.topk(2, 1).values.square()),
    # activations
    **{name: plain(getattr(F, name)) for name in (
        "gelu", "silu", "mish", "elu", "celu", "selu", "softplus", "logsigmoid", "glu",
        "hardswish", "tanhshrink", "softsign", "leaky_relu", "sigmoid", "tanh")},
    "gelu, tanh": plain(lambda x: F.gelu(x, approximate="tanh")),
    "prelu": (lambda x: F.prelu(x[:2], x[2, :1]), (3, 4)),
    # linear algebra
    "eigh": square(lambda x: torch.linalg.eigh(definite(x))[0]),
    "eigenvectors": square(lambda x: torch.linalg.eigh(definite(x))[1].square()),
    "svdvals": square(torch.linalg.svdvals),
    "solve": (lambda x: torch.linalg.solve(definite(x[:3]), x[3]), (4, 3)),
    "cholesky": square(lambda x: torch.linalg.cholesky(definite(x))),
    "inv": square(lambda x: torch.linalg.inv(definite(x))),
    "logdet": square(lambda x: torch.logdet(definite(x))),
    "qr": square(lambda x: torch.linalg.qr(x)[1]),
    "pinv": (torch.linalg.pinv, (4, 3)),
    "matrix_exp": square(torch.linalg.matrix_exp),
    "einsum": square(lambda x: torch.einsum("ij,jk,ik->i", x, x, x)),
    # indices
    "embedding": plain(lambda x: F.embedding(ROWS, x).square()),
    "gather": plain(lambda x: x.gather(1, LABELS[:, None]).square()),
    "index_put": (
        lambda x: ZEROS.index_put((ROWS,), x, accumulate=True).square(), (4, 4)),
    "scatter_add": (
        lambda x: ZEROS.scatter_add(0, ROWS[:, None].expand(4, 4), x).square(), (4, 4)),
    "scatter_reduce, mean": (
        lambda x: ZEROS.scatter_reduce(0, ROWS[:, None].expand(4, 4), x * x, "mean"), (4, 4)),
    # pooling, padding, resampling, convolution, recurrence
    "max_pool2d": image(lambda x: F.max_pool2d(x, 2).square()),
    "max_pool2d, windows that meet": image(lambda x: F.max_pool2d(x, 3, 1).square()),
    "avg_pool2d": image(lambda x: F.avg_pool2d(x, 2).square()),
    "adaptive_avg_pool2d": image(lambda x: F.adaptive_avg_pool2d(x, 3).square()),
    **{f"pad, {mode}": image(lambda x, m=mode: F.pad(x, (1, 1, 1, 1), mode=m).square())
       for mode in ("constant", "reflect", "replicate", "circular")},
    **{f"interpolate, {mode}": image(lambda x, m=mode: F.interpolate(x, size=6, mode=m).square())
       for mode in ("nearest", "bilinear", "bicubic", "area")},
    **{f"grid_sample, {mode}": (lambda x, m=mode: sampled(x, m), (1, 3, 3, 3))
       for mode in ("bilinear", "bicubic")},
    "conv2d": (lambda x: F.conv2d(x[:1], x[1:], padding=1), (3, 2, 3, 3)),
    "conv_transpose2d": (lambda x: F.conv_transpose2d(x[:2], x[2:]), (4, 2, 2, 2)),
    "unfold": image(lambda x: F.unfold(x, 2).square()),
    "gru": (gru, (27, 3)),
    "lstm": (lstm, (36, 3)),
    # losses
    "huber_loss": pair(lambda x, y: F.huber_loss(x, y * y, reduction="none")),
    "smooth_l1_loss": pair(lambda x, y: F.smooth_l1_loss(x, y * y, reduction="none")),
    "mse_loss": pair(lambda x, y: F.mse_loss(x, y * y)),
    "kl_div": pair(lambda x, y: F.kl_div(x.log_softmax(0), y.softmax(0), reduction="sum")),
    "binary_cross_entropy": pair(lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid())),
    "binary_cross_entropy_with_logits": pair(
        lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid())),
    "cross_entropy": plain(lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1)),
    "nll_loss": plain(lambda x: F.nll_loss(x.log_softmax(1).square(), LABELS)),
    "gaussian_nll_loss": pair(lambda x, y: F.gaussian_nll_loss(x, y, y.exp())),
    "soft_margin_loss": plain(lambda x: F.soft_margin_loss(x, x.detach().sign())),
    "triplet_margin_loss": (lambda x: F.triplet_margin_loss(x[0], x[1], x[2]), (3, 2, 4)),
}  # fmt: skip
EPS = 1e-5
# Infinite second derivatives of the squares' root at 0, or NaN, in the third order alone: torch's.
NO_THIRD = {"logcumsumexp", "eigenvectors"}


def near(got: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error < tolerance, error.item()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # grid_sample under vmap
@pytest.mark.parametrize("name", FUNCTIONS)
def test_curvature_of_what_models_are_made_of(name):
    f, shape = FUNCTIONS[name]
    x, u = draw(1, *shape), draw(3, *shape)
    n, w = x.numel(), draw(2, *f(x).shape)

    def scalar(p):
        return (f(p["x"]) * w).sum() + f(p["x"]).square().sum()

    def loss(z):
        return (z * w).sum() + z.square().sum() / 2

    # Differences of first derivatives in reverse mode, and of values: torch's kernels for these.
    steps = EPS * torch.eye(n, dtype=x.dtype).view(n, *shape)
    slope = lambda x: grad(scalar)({"x": x})["x"].flatten()  # noqa: E731
    matrix = torch.stack([slope(x + e) - slope(x - e) for e in steps]) / (2 * EPS)
    jacobian = torch.stack([(f(x + e) - f(x - e)).flatten() for e in steps], 1) / (2 * EPS)

    v = u.flatten()
    near(hvp(scalar, {"x": x}, {"x": u})["x"].flatten(), matrix @ v)
    for chunk in (None, 1, 5):
        near(hessian(scalar, chunk)({"x": x})["x"]["x"].reshape(n, n), matrix)
    near(
        gnvp(lambda p: f(p["x"]), loss, {"x": x}, {"x": u})["x"].flatten(),
        jacobian.mT @ (jacobian @ v),
        1e-5,
    )
    product = lambda v: hvp(scalar, {"x": x}, v)  # noqa: E731
    exact = lambda v: {"x": (matrix @ v["x"].flatten()).view(shape)}  # noqa: E731
    near(*(hutchinson_trace(a, {"x": x}, random.key(0), 3) for a in (product, exact)))
    if name in NO_THIRD:
        return
    # The third derivative along u, and that of the Gauss-Newton matrix.
    for form in (
        lambda x: (hvp(scalar, {"x": x}, {"x": u})["x"] * u).sum(),
        lambda x: (gnvp(lambda p: f(p["x"]), loss, {"x": x}, {"x": u})["x"] * u).sum(),
    ):
        difference = (form(x + EPS * u) - form(x - EPS * u)) / (2 * EPS)
        size = grad(form)(x).norm() * u.norm()
        assert ((grad(form)(x) * u).sum() - difference).abs() < 1e-5 * size.clamp(min=1e-3)


REFUSED = {
    "embedding_bag": plain(lambda x: F.embedding_bag(ROWS[None], x)),
    "embedding": plain(lambda x: F.embedding(ROWS, x, scale_grad_by_freq=True)),
    "ctc_loss": (
        lambda x: F.ctc_loss(
            x.log_softmax(2), torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2])
        ),
        (5, 1, 4),
    ),
    "multi_margin_loss": plain(lambda x: F.multi_margin_loss(x, LABELS, p=2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_second_derivative_is_refused_by_its_name(name):
    f, shape = REFUSED[name]
    p = {"x": draw(1, *shape)}
    scalar = lambda p: f(p["x"]).square().sum()  # noqa: E731
    for call in (
        lambda: hvp(scalar, p, p),
        lambda: hessian(scalar)(p),
        lambda: gnvp(lambda p: f(p["x"]), lambda z: z.square().sum(), p, p),
    ):
        with pytest.raises(NotImplementedError, match=rf"^{name}"):
            call()


@pytest.mark.parametrize(
    "reduce",
    [
        lambda x: torch.ones(3).double().scatter_reduce(0, ROWS, x, "prod"),
        lambda x: torch.scatter_reduce(torch.ones(3).double(), 0, ROWS, x, reduce="prod"),
    ],
    ids=["method", "function"],
)
def test_products_of_what_is_scattered_have_no_forward_mode(reduce):
    p = {"x": draw(1, 4)}
    with pytest.raises(NotImplementedError, match=r"scatter_reduce: .* reduce='prod' is wrong"):
        gnvp(lambda p: reduce(p["x"]), lambda z: z.square().sum(), p, p)
    near(
        hessian(lambda p: reduce(p["x"]).square().sum())(p)["x"]["x"],
        hessian(lambda p: (p["x"][1] * p["x"][3]).square() + p["x"][[0, 2]].square().sum())(p)["x"][
            "x"
        ],
    )


def test_a_padding_row_is_constant_in_every_mode():
    p, u, v = {"x": draw(1, 3, 4)}, {"x": draw(2, 3, 4)}, {"x": draw(3, 3, 4)}
    f = lambda p: F.embedding(ROWS, p["x"], padding_idx=2).square()  # noqa: E731
    loss = lambda z: z.pow(3).sum()  # noqa: E731
    gu, gv = gnvp(f, loss, p, u)["x"], gnvp(f, loss, p, v)["x"]
    near((gu * v["x"]).sum(), (gv * u["x"]).sum(), 1e-12)
    assert gu[:2].all() and not gu[2].any()


def test_compiled_products_are_those_of_eager(plain_backend):
    for name in ("layer_norm, scaled", "multi-head attention", "RBF kernel", "weight_norm"):
        f, shape = FUNCTIONS[name]
        x, u = {"x": draw(1, *shape)}, {"x": draw(2, *shape)}
        scalar = lambda p, f=f: f(p["x"]).square().sum()  # noqa: E731
        near(fdl.jit(lambda x, u, s=scalar: hvp(s, x, u))(x, u)["x"], hvp(scalar, x, u)["x"], 1e-12)


# ------------------------------------------------------------------------- all derivatives at 0


def flat(t):
    return sum(leaf.square().sum() + leaf.sum() for leaf in tree.leaves(t))


def loss_of(p, batch, **_):
    return ((batch[0] @ p["w"]).square() * batch[1]).sum()


BATCH = (torch.tensor([[1.0, 2.0], [0.0, 0.0], [-1.0, 3.0]]).double(), torch.ones(3).double())
TWO = lambda p: tree.map(lambda leaf: torch.stack([leaf, leaf]), p)  # noqa: E731
OUTPUT = lambda p: torch.cat([BATCH[0] @ p["w"][:, None], p["b"].expand(3, 1)], 1)  # noqa: E731

AT_ZERO = {
    "transforms.autograd_grad_and_value": None,  # refuses to be differentiated
    "transforms.checkpoint": lambda p: transforms.checkpoint(OUTPUT)(p),
    "transforms.clipped_grad_sum": lambda p: transforms.clipped_grad_sum(loss_of, 0.5)(p, BATCH),
    "transforms.gnvp": lambda p: gnvp(OUTPUT, flat, p, p),
    "transforms.hessian": lambda p: hessian(lambda p: flat(OUTPUT(p)))(p),
    "transforms.hutchinson_trace": lambda p: hutchinson_trace(
        lambda v: hvp(lambda p: flat(OUTPUT(p)), p, v), p, random.key(0), 2
    ),
    "transforms.hvp": lambda p: hvp(lambda p: flat(OUTPUT(p)), p, p),
    "transforms.per_sample_grads": lambda p: transforms.per_sample_grads(loss_of)(p, BATCH),
    "transforms.per_sample_norms": lambda p: transforms.per_sample_norms(loss_of)(p, BATCH),
    "transforms.sequential_vmap": lambda p: transforms.sequential_vmap(
        lambda p: OUTPUT(p).square()
    )(TWO(p)),
    "transforms.stop_gradient": lambda p: tree.map(torch.mul, p, transforms.stop_gradient(p)),
    "population.best": lambda p: population.best(TWO(p), torch.tensor([1.0, 0.0])),
    "population.create": None,  # draws; nothing floating goes in but rates
    "population.ensemble": lambda p: population.ensemble(
        lambda p, x: x @ p["w"].outer(p["w"]), TWO(p), BATCH[0]
    ),
    "population.member": lambda p: population.member(TWO(p), 1),
    "population.size": None,  # counts
}


def test_every_function_is_differentiated_at_0():
    public = {f"transforms.{name}" for name in transforms.__all__}
    assert public | {f"population.{name}" for name in population.__all__} == set(AT_ZERO)


@pytest.mark.parametrize("name", [name for name, f in AT_ZERO.items() if f])
@pytest.mark.parametrize("at", [0.0, 1.0], ids=["all zero", "a zero row"])
def test_second_derivatives_at_0_are_finite(name, at):
    """Reverse over reverse, as `hvp` and `hessian` go, also for many points at once."""
    p = {"w": torch.full((2,), at).double(), "b": torch.zeros(1).double()}
    v = tree.map(torch.ones_like, p)
    second = lambda p: grad(lambda p: flat(grad(lambda p: flat(AT_ZERO[name](p)))(p)))(p)  # noqa: E731
    for found in (second(p), hvp(lambda p: flat(AT_ZERO[name](p)), p, v), vmap(second)(TWO(p))):
        assert all(leaf.isfinite().all() for leaf in tree.leaves(found))
