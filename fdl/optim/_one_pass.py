"""Compute elementwise maths of many leaves in one pass over each, in C++.

A foreach function reads and writes every leaf for each operation; here what lies between operations
stays in the cache of the processor, and Python is left once. The extension is that which dispatches
jitted calls; it is used where it has been built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fdl._compiler import _dispatch
from fdl._numerics import root
from fdl.optim._leaves import PLAIN, Node, argument

DTYPES = (torch.float32, torch.float64)
# Of `dispatch/elementwise.h`. Whether a maximum of 0.0 and −0.0 is the first or the second depends,
# in torch, on the place of an element: it is left out.
SYMBOLS: dict[Callable[..., Tensor], str] = {
    torch.add: "+",
    torch.sub: "-",
    torch.mul: "*",
    torch.div: "/",
    torch.neg: "n",
    torch.abs: "a",
    torch.sign: "s",
    torch.sqrt: "q",
    root: "r",
}


def in_one_pass(
    f: Callable[..., tuple[Any, ...]], columns: Sequence[list[Any]]
) -> list[list[Tensor]] | None:
    """Call a function of the tensors of one leaf for all leaves, or return None.

    Args:
        f: a pure function, which is passed `Leaves`.
        columns: for each argument of `f`, that of every leaf.

    Returns:
        For each result of `f`, that of every leaf; None if leaves are not dense tensors of one
        dtype on a CPU, or `f` does more than `SYMBOLS`.

    >>> in_one_pass(lambda p: (p.exp(),), [[torch.ones(1)]])
    """
    first = columns[0][0]
    if type(first) not in PLAIN or first.dtype not in DTYPES or first.device.type != "cpu":
        return None
    extension = _dispatch.at_hand()
    if extension is None or not all(type(column[0]) in PLAIN for column in columns):
        return None
    tape: list[Node] = []
    try:
        arguments = [argument(tape, column, True) for column in columns]
        results = [result.node for result in f(*arguments)]
        program = _translate([x.node for x in arguments], tape, results)
    except Exception:  # an error of the function is raised again for the leaf at fault
        return None
    finally:
        tape.clear()  # a cycle would keep the tensors until the next garbage collection
    computed = extension.elementwise(*program, list(columns)) if program else NotImplemented
    return None if computed is NotImplemented else computed


def _translate(
    arguments: list[Node], tape: list[Node], results: list[Node]
) -> tuple[str, list[int], list[int], list[Any]] | None:
    """Return operations, their operands and the results as places of values, and the scalars."""
    steps = [node for node in tape if node.readers or node in results]
    symbols = [SYMBOLS.get(node.operation, "") for node in steps]
    if not all(symbols) or any(node.kind is not arguments[0].kind for node in steps):
        return None
    scalars = [x for node in steps for x in node.operands if type(x) is not Node]
    places = {id(value): place for place, value in enumerate([*arguments, *scalars, *steps])}
    # An operation of one operand has it twice.
    operands = [places[id(x)] for node in steps for x in (node.operands * 2)[:2]]
    found = [places[id(node)] for node in results]
    if len({*found}) < len(found) or min(found) < len(arguments):
        return None
    return "".join(symbols), operands, found, scalars
