"""The peers in PyTorch: common training loops, and the fastest we found with `torch.compile`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.utils.data import DataLoader, Dataset, TensorDataset

from models import torch_modules
from train.bench.runner import Loop, Runner, Trajectory
from train.bench.task import Array, Task

__all__ = [
    "CompiledModel",
    "CompiledStep",
    "Eager",
    "Learner",
    "TorchRunner",
    "floats",
    "make_optimizer",
]


def floats(task: Task) -> Tensor:
    """Convert the examples to the inputs of models: images as `ToTensor` makes them."""
    x = torch.from_numpy(task.x)
    return x[:, None].float() / 255 if task.images else x


class TorchRunner(Runner):
    """Base of the runners on torch tensors."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.device = torch.device(task.device)
        if self.device.type == "cuda":  # float32, like all runners; products use it by default
            torch.backends.cudnn.allow_tf32 = False

    def wait(self, losses: Any) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self) -> int | None:
        """Ask the caching allocator."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else None

    def peak(self) -> int | None:
        """Ask the caching allocator."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def make_optimizer(
    task: Task, module: nn.Module, fused: bool | None = None
) -> torch.optim.Optimizer:
    """Make the optimizer of a task."""
    if task.adam:
        return torch.optim.Adam(module.parameters(), task.lr, fused=fused)
    return torch.optim.SGD(
        module.parameters(),
        task.lr,
        task.momentum,
        weight_decay=task.weight_decay,
        fused=fused,
    )


class TorchLoop(TorchRunner, Loop):
    """Base of the loops in this file."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.rows = list(torch.from_numpy(task.rows).to(self.device))
        self.labels = torch.from_numpy(task.y).to(self.device)

    def losses(self, losses: list[Tensor]) -> list[float]:
        """Copy all losses at once."""
        values: list[float] = torch.stack(losses).tolist()
        return values


class Eager(TorchLoop):
    """`nn.Module`, `backward()` and a `torch.optim` optimizer, on float images on the device."""

    fused: bool | None = None  # torch's default

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.module = torch_modules.make(task.model, task.rates).to(self.device)
        self.loss = torch_modules.loss_of(task.model)
        self.model: Callable[[Tensor], Tensor] = self.module
        self.images = self.examples()
        self.reset()

    def examples(self) -> Tensor:
        """Copy the examples to the device."""
        return floats(self.task).to(self.device)

    def reset(self) -> None:
        """Restore the initial weights and a new optimizer."""
        torch.manual_seed(0)
        start = self.task.params | self.task.buffers
        initial = {name: torch.from_numpy(p) for name, p in start.items()}
        self.module.load_state_dict(initial)
        self.optimizer = make_optimizer(self.task, self.module, self.fused)

    def train_on(self, x: Tensor, y: Tensor) -> Tensor:
        """Make the usual step."""
        self.optimizer.zero_grad()
        loss = self.loss(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def step(self, i: int) -> Tensor:
        """Train on the rows of batch i."""
        return self.train_on(self.images[self.rows[i]], self.labels[self.rows[i]])

    def params(self) -> dict[str, Array]:
        """Copy the parameters and buffers of the module."""
        return {name: p.cpu().numpy().copy() for name, p in self.module.state_dict().items()}


class CompiledModel(Eager):
    """`Eager` with `torch.compile(model)` and the fused optimizer."""

    fused = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.model = torch.compile(self.module, dynamic=False)


class Samples(Dataset[tuple[Tensor, int]]):
    """Images one at a time, as `torchvision.datasets.FashionMNIST` returns them."""

    def __init__(self, images: Array, labels: Array) -> None:
        from torchvision.transforms import ToTensor

        self.images, self.labels, self.transform = images, labels, ToTensor()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


class Learner(Eager):
    """A beginner's loop: a `DataLoader` with 4 workers and a transform of each sample.

    A call is a whole epoch, because each epoch starts its workers anew.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.dataset: Dataset[Any] = (
            Samples(task.x, task.y)
            if task.images
            else TensorDataset(torch.from_numpy(task.x), torch.from_numpy(task.y))
        )
        self.steps = len(task.batches)
        warnings.filterwarnings("ignore", "This DataLoader will create 4 worker processes")

    def examples(self) -> Tensor:
        """Return nothing: the `DataLoader` reads the examples."""
        return torch.empty(0)

    def over(self, index: Array) -> list[float]:
        """Train on some batches, in the order that all runners have."""
        order: list[int] = index.flatten().tolist()
        loader = DataLoader(self.dataset, batch_size=index.shape[1], sampler=order, num_workers=4)
        return [self.train_on(x.to(self.device), y.to(self.device)).item() for x, y in loader]

    def epoch(self) -> list[float]:
        """Train on every batch of the epoch."""
        return self.over(self.task.batches)

    def losses(self, losses: list[Any]) -> list[float]:
        """Return the losses, which are numbers already."""
        return losses

    def first(self) -> int:
        """Start the loader and make one step."""
        self.over(self.task.rows[:1])
        return 1

    def trajectory(self) -> Trajectory:
        """Train on the rows of all runners, not on a whole epoch."""
        self.reset()
        losses = self.over(self.task.rows) + self.over(self.task.rows)
        return Trajectory(np.array(losses), self.params())


class CompiledStep(TorchLoop):
    """The whole step as one compiled program: gather, loss, gradient and update.

    The fastest version we found: functional gradients, in-place updates, images gathered as bytes,
    rates as constants. Running statistics are computed from copies, which the compiler removes.
    """

    def __init__(
        self, task: Task, *, mode: str | None = None, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(task)
        self.images = torch.from_numpy(task.x).to(self.device)
        self.initial = [torch.from_numpy(p) for p in (task.params | task.buffers).values()]
        leaves = [p.to(self.device, copy=True) for p in self.initial]
        self.current, self.buffers = leaves[: len(task.params)], leaves[len(task.params) :]
        self.slots = make_slots(task, self.current)
        for leaf in [*leaves, *self.slots, self.images, self.labels]:
            torch._dynamo.mark_static_address(leaf)  # else CUDA graphs copy it at each step
        module = torch_modules.make(task.model, task.rates).to("meta")
        step = make_step(task, module)
        self.program = torch.compile(
            step, fullgraph=True, dynamic=False, mode=mode, options=options
        )

    def reset(self) -> None:
        """Copy the initial weights into the parameters, and likewise the buffers."""
        torch.manual_seed(0)
        for leaf, initial in zip([*self.current, *self.buffers], self.initial, strict=True):
            leaf.copy_(initial)
        for slot in self.slots:
            slot.zero_()

    def step(self, i: int) -> Tensor:
        """Call the program."""
        leaves = self.current, self.buffers, self.slots
        return self.program(*leaves, self.images, self.labels, self.rows[i])

    def params(self) -> dict[str, Array]:
        """Copy the parameters and buffers."""
        names = [*self.task.params, *self.task.buffers]
        pairs = zip(names, [*self.current, *self.buffers], strict=True)
        return {name: p.cpu().numpy().copy() for name, p in pairs}


def make_step(task: Task, module: nn.Module) -> Callable[..., Tensor]:
    """Make the step `(params, buffers, slots, images, labels, rows) -> loss`, all in place."""
    loss_fn, has_images = torch_modules.loss_of(task.model), task.images
    names, buffer_names = list(task.params), list(task.buffers)
    update = adam_update if task.adam else sgd_update

    def objective(
        params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        buffers = {name: leaf.clone() for name, leaf in buffers.items()}
        prediction = functional_call(module, params | buffers, (x,))
        return loss_fn(prediction, y), list(buffers.values())

    def step(
        params: list[Tensor],
        buffers: list[Tensor],
        slots: list[Tensor],
        images: Tensor,
        labels: Tensor,
        rows: Tensor,
    ) -> Tensor:
        x = images[rows]
        if has_images:
            x = x[:, None].float() / 255
        named = dict(zip(names, params, strict=True))
        tracked = dict(zip(buffer_names, buffers, strict=True))
        run = grad_and_value(objective, has_aux=True)
        grads, (loss, now) = run(named, tracked, x, labels[rows])
        update(task, params, list(grads.values()), slots)
        for leaf, new in zip(buffers, now, strict=True):
            leaf.copy_(new)
        return loss

    return step


def make_slots(task: Task, params: list[Tensor]) -> list[Tensor]:
    """Make what the optimizer remembers: of Adam two moments of each parameter and a count."""
    if task.adam:
        return [torch.zeros_like(p) for p in params * 2] + [params[0].new_zeros(())]
    return [torch.zeros_like(p) for p in params] if task.momentum else []


def sgd_update(task: Task, params: list[Tensor], grads: list[Tensor], slots: list[Tensor]) -> None:
    """Update in place as `torch.optim.SGD` does."""
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if task.weight_decay:
            g = g + task.weight_decay * p
        if slots:
            g = slots[i].mul_(task.momentum).add_(g)
        p.sub_(task.lr * g)


def adam_update(task: Task, params: list[Tensor], grads: list[Tensor], slots: list[Tensor]) -> None:
    """Update in place as `torch.optim.Adam` does."""
    n, count = len(params), slots[-1]
    count.add_(1)
    first, second = 1 - 0.9**count, 1 - 0.999**count
    for p, g, m, v in zip(params, grads, slots[:n], slots[n:-1], strict=True):
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        p.sub_(task.lr / first * m / ((v / second).sqrt() + 1e-8))


def compiled_step_cpp(task: Task) -> CompiledStep:
    """Compile the step with Inductor's C++ wrapper, which costs less Python per call."""
    return CompiledStep(task, options={"cpp_wrapper": True})


class CudaGraphs(CompiledStep):
    """The compiled step replayed as a CUDA graph."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, mode="reduce-overhead")

    def step(self, i: int) -> Tensor:
        """Keep the loss, which the next replay overwrites."""
        torch.compiler.cudagraph_mark_step_begin()
        return super().step(i).clone()
