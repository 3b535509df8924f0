"""A law over the public functions: an error about an argument names the function or the argument.

Each function is called as in the example of its docstring, with one argument replaced.
"""

import contextlib
import doctest
import inspect
import io
import re
import traceback
import warnings

import pytest

from tests.laws.test_docstrings import MODULES

EXAMPLE = "<example>"  # the file name of code in a docstring


class Odd:
    """Nothing that a function could expect."""

    def __repr__(self):
        return "<odd>"


WRONG = (None, "wrong", Odd(), float("nan"), True, b"1", [])

# The first module that lists a function is where its example finds it.
FUNCTIONS = {
    f"{module.__name__}.{name}": (module, name)
    for module in MODULES.values()
    if module.__name__.startswith("fdl")
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
    and getattr(module, name).__module__.startswith("fdl")
}

NO_EXAMPLE = {
    "fdl.data.fashion_mnist": "reads files that may be absent",
    "fdl.data.from_torchvision": "needs torchvision",
    "fdl.data.table": "needs pyarrow",
    "fdl.interop.from_jax": "needs JAX",
    "fdl.interop.from_keras": "needs h5py",
    "fdl.interop.from_orbax": "needs Orbax",
    "fdl.interop.to_jax": "needs JAX",
    "fdl.parallel.check_replicated": "needs several processes",
    "fdl.parallel.eval_step": "needs several processes",
    "fdl.parallel.own_rows": "needs several processes",
}

# Arguments whose errors name neither, by function, and why.
EXCEPTIONS: dict[str, dict[str, str]] = {}


class Done(BaseException):
    """Ends an example where all wrong calls have been made; no library code catches it."""


def faults(f, args, kwargs):
    """Call a function with each argument replaced; yield the errors that name nothing."""
    signature = inspect.signature(f)
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        allows_none = parameter.default is None or "None" in str(parameter.annotation)
        for value in WRONG[allows_none:]:
            call = signature.bind(*args, **kwargs)
            call.arguments[name] = value
            try:
                f(*call.args, **call.kwargs)
            except Exception as error:
                if not says_enough(error, f.__name__, name):
                    yield name, f"{value!r}: {type(error).__name__}: {error}"


def says_enough(error, *names):
    """Whether an error has one of the names, or a file's, or is one of the example's own code."""
    if any(re.search(rf"\b{name}\b", str(error)) for name in names):
        return True
    own = traceback.extract_tb(error.__traceback__)[-1].filename == EXAMPLE
    return own or (isinstance(error, OSError) and error.filename is not None)


def probe(module, name, monkeypatch):
    """Run the example of a function up to its first call of it; return the faults, None if none."""
    f = getattr(module, name)
    scope = dict(f.__globals__)
    found = []

    def wrapped(*args, **kwargs):
        if inspect.currentframe().f_back.f_code.co_filename != EXAMPLE:
            return f(*args, **kwargs)
        found.append(list(faults(f, args, kwargs)))
        raise Done

    scope[name] = wrapped
    monkeypatch.setattr(module, name, wrapped)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Done):
        for example in doctest.DocTestParser().get_examples(f.__doc__):
            exec(compile(example.source, EXAMPLE, "single"), scope)
    return found[0] if found else None


@pytest.mark.usefixtures("plain_backend")
@pytest.mark.parametrize("place", FUNCTIONS.values(), ids=FUNCTIONS)
def test_an_error_names_the_function_or_the_argument(place, request, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a wrong path is the name of a new file
    name = f"{place[0].__name__}.{place[1]}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = probe(*place, monkeypatch)
    assert (found is None) == (name in NO_EXAMPLE), "the row of NO_EXAMPLE is missing or stale"
    assert {argument for argument, _ in found or ()} == {*EXCEPTIONS.get(name, ())}, found


def test_the_law_sees_most_functions():
    assert len(FUNCTIONS) > 250 and len(NO_EXAMPLE) < 0.1 * len(FUNCTIONS)
    assert {*NO_EXAMPLE, *EXCEPTIONS} <= FUNCTIONS.keys()
