"""What docs/works-with.md says does not work: if a test fails, the page has a line to change."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad

import fdl
from fdl import interop, losses, metrics, nn, optim, random, tree

MODEL = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
PARAMS = MODEL.init(random.key(0))
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries
X, Y = random.normal(random.key(1), (32, 4)), random.randint(random.key(2), (32,), 0, 3)


def test_kfac_and_last_layers_need_layers_of_torch():
    curvlinops, laplace = pytest.importorskip("curvlinops"), pytest.importorskip("laplace")
    module, data = interop.as_module(MODEL, PARAMS), torch.utils.data.TensorDataset(X, Y)
    with pytest.raises(NotImplementedError, match="un-supported layers"):
        curvlinops.KFACLinearOperator(
            module, torch.nn.CrossEntropyLoss(), [*module.parameters()], [(X, Y)]
        )
    with pytest.raises(ValueError, match="all modules have children"):
        laplace.Laplace(module, "classification", "last_layer").fit(
            torch.utils.data.DataLoader(data, batch_size=16)
        )


def test_captum_sees_no_layers_in_a_model_as_a_module():
    attr = pytest.importorskip("captum.attr")
    module = interop.as_module(MODEL, PARAMS)
    with pytest.raises(AssertionError, match="did not obtain any outputs"):
        attr.LayerActivation(module, module.get_submodule("0")).attribute(X)


def test_torchdiffeq_reads_values_and_has_old_autograd_functions():
    odeint = pytest.importorskip("torchdiffeq").odeint

    def end(y, method):
        return odeint(lambda t, y: -y, y, torch.linspace(0, 1, 5), method=method)[-1].sum()

    assert torch.isclose(end(torch.ones(1), "rk4"), torch.tensor(-1.0).exp(), atol=1e-4)
    with pytest.raises(RuntimeError, match="asks for the value"):
        fdl.jit(lambda y: end(y, "rk4"))(torch.ones(2))
    with pytest.raises(RuntimeError, match="setup_context"):
        grad(end)(torch.ones(2), "dopri5")


def test_kernels_of_gpytorch_compare_values():
    gpytorch = pytest.importorskip("gpytorch")
    kernel = gpytorch.kernels.RBFKernel()
    with gpytorch.settings.trace_mode(), pytest.raises(RuntimeError, match="asks for the value"):
        fdl.jit(lambda x: kernel(x).to_dense())(X)


def test_torchmetrics_validates_values():
    functional = pytest.importorskip("torchmetrics.functional")
    options = {"task": "multiclass", "num_classes": 3, "validate_args": False}
    with pytest.raises(RuntimeError, match="asks for the value"):
        fdl.jit(lambda p, y: functional.auroc(p, y, **options))(X[:, :3], Y)
    accuracy = pytest.importorskip("torchmetrics").Accuracy("multiclass", num_classes=3)
    with pytest.raises(ValueError, match="keeps a tensor after it returned: accuracy"):
        fdl.jit(lambda p, y: accuracy(p, y))(X[:, :3], Y)
    with pytest.raises(ValueError, match="not a mean over rows"):
        metrics.per_batch(lambda p, y: functional.f1_score(p, y, average="macro", **options))(
            X[:, :3], Y
        )


def test_samplers_of_posteriors_draw_from_torch_and_take_torchopt():
    posteriors = pytest.importorskip("posteriors")

    def log_posterior(params, batch):
        return -losses.cross_entropy(MODEL.apply(params, X), Y), ()

    sgld = posteriors.sgmcmc.sgld.build(log_posterior, lr=0.1)
    with pytest.raises(ValueError, match="draws from torch's generator"):
        fdl.jit(lambda p: sgld.update(sgld.init(p), ())[0].params)(PARAMS)
    vi = posteriors.vi.diag.build(log_posterior, optimizer=optim.adam(0.1))
    with pytest.raises((TypeError, ValueError)):
        vi.update(vi.init(PARAMS), ())


def test_a_dict_in_a_tensorclass_is_not_a_branch():
    tensordict = pytest.importorskip("tensordict")

    class State(tensordict.TensorClass):
        params: object

    assert tree.leaves(State({"w": torch.ones(2)}, batch_size=[])) == []
    state = State(tensordict.TensorDict({"w": torch.ones(2)}), batch_size=[])
    assert len(tree.leaves(state)) == 1


class Function(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args)


def test_torch_export_fails_for_gradients_through_two_linear_layers():
    """Without fdl, too; `fdl.export` writes a whole step."""
    one = Function(grad(lambda w: F.linear(X, w).sum()))
    assert torch.export.export(one, (torch.eye(4),))
    with pytest.raises(Exception, match="meta conversion"):
        torch.export.export(
            Function(grad(lambda w: F.linear(F.linear(X, w), w).sum())), (torch.eye(4),)
        )
