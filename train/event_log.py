"""Log the epochs of a run for TensorBoard: `--log tensorboard`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.config import Recipe

__all__ = ["check", "event_log"]

Log = Callable[[Mapping[str, Any]], None]  # takes a line of metrics.jsonl


def check(config: Recipe) -> None:
    """Import TensorBoard if the options ask for it, before anything is trained.

    Raises:
        ValueError: it is not installed, or cannot be imported.
    """
    if config.log == "tensorboard":
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"--log tensorboard needs the package tensorboard ({error}); install it with "
                "pip install 'fdl[tensorboard]', or go on without it, --log off"
            ) from error


@contextmanager
def event_log(folder: Path | None, records: Sequence[Mapping[str, Any]] = ()) -> Iterator[Log]:
    """Yield a function that logs the record of an epoch, once it has logged those given.

    The events are in `folder/tensorboard`: one for each number of a record, by its name, at the
    step of its epoch. A resumed run writes all of them anew, as those of a run that was killed may
    be of epochs that it repeats; TensorBoard leaves out the earlier ones.

    Args:
        folder: that of the run; None logs nothing.
        records: lines of `metrics.jsonl`, the epochs that a resumed run has done.

    >>> with event_log(None) as log:
    ...     log({"epoch": 1, "loss": 0.5})
    """
    if folder is None:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / "tensorboard", purge_step=1) as writer:

        def log(record: Mapping[str, Any]) -> None:
            for name, value in record.items():
                if name != "epoch":
                    writer.add_scalar(name, value, record["epoch"])
            writer.flush()

        for record in records:
            log(record)
        yield log
