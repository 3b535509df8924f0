"""A law over the public functions: an error about an argument names the function or the argument.

Each function is called as in the example of its docstring, with one argument replaced.
"""

import contextlib
import doctest
import functools
import inspect
import io
import re
import traceback
import warnings
from types import FunctionType

import pytest

from tests.laws.test_docstrings import MODULES

EXAMPLE = "<example>"  # the file name of code in a docstring


class Odd:
    """Nothing that a function could expect."""

    def __repr__(self):
        return "<odd>"


WRONG = (None, "wrong", Odd(), float("nan"), True, b"1", [])

OWN_MODULES = [m for m in MODULES.values() if m.__name__.startswith("fdl")]

# The first module that lists a function is where its example finds it.
FUNCTIONS = {
    f"{module.__name__}.{name}": (module, name)
    for module in OWN_MODULES
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


def faults(call_it, args, kwargs, f):
    """Call a function with each argument replaced; yield the errors that name nothing."""
    signature = inspect.signature(call_it)
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        allows_none = parameter.default is None or "None" in str(parameter.annotation)
        for value in WRONG[allows_none:]:
            call = signature.bind(*args, **kwargs)
            call.arguments[name] = value
            try:
                call_it(*call.args, **call.kwargs)
            except Exception as error:
                if not says_enough(error, f.__name__, name):
                    yield name, f"{value!r}: {type(error).__name__}: {error}"


def says_enough(error, *names):
    """Whether an error has one of the names, or a file's, or is one of the example's own code."""
    if any(re.search(rf"\b{name}\b", str(error)) for name in names):
        return True
    own = traceback.extract_tb(error.__traceback__)[-1].filename == EXAMPLE
    return own or (isinstance(error, OSError) and error.filename is not None)


def probe(holder, name, text, scope, monkeypatch):
    """Run an example up to its first call of a function; return the faults, None if none.

    `holder` is the module or class that has the function, and `scope` where the example runs.
    """
    original = vars(holder)[name]
    f = getattr(original, "__func__", original)
    found = []

    def wrapped(*args, **kwargs):
        if inspect.currentframe().f_back.f_code.co_filename != EXAMPLE:
            return f(*args, **kwargs)
        own = args[: inspect.isclass(holder)]  # self or cls
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, original)
            found.append(list(faults(functools.partial(f, *own), args[len(own) :], kwargs, f)))
        raise Done

    replacement = wrapped if original is f else type(original)(wrapped)
    monkeypatch.setattr(holder, name, replacement)
    if not inspect.isclass(holder):
        scope[name] = wrapped
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Done):
        for example in doctest.DocTestParser().get_examples(text):
            exec(compile(example.source, EXAMPLE, "single"), scope)
    return found[0] if found else None


@pytest.mark.usefixtures("plain_backend")
@pytest.mark.parametrize("place", FUNCTIONS.values(), ids=FUNCTIONS)
def test_an_error_names_the_function_or_the_argument(place, request, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a wrong path is the name of a new file
    name = f"{place[0].__name__}.{place[1]}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f = getattr(*place)
        found = probe(*place, f.__doc__, dict(f.__globals__), monkeypatch)
    assert (found is None) == (name in NO_EXAMPLE), "the row of NO_EXAMPLE is missing or stale"
    assert {argument for argument, _ in found or ()} == {*EXCEPTIONS.get(name, ())}, found


# A method is called in the example of its own docstring, or in that of its class.
METHODS = {
    f"{cls.__name__}.{method}": (module, cls, method)
    for module in OWN_MODULES
    for cls in (getattr(module, name) for name in module.__all__)
    if inspect.isclass(cls) and cls.__module__.startswith("fdl")
    for method, f in vars(cls).items()
    if (method == "__init__" and not issubclass(cls, tuple))
    or (not method.startswith("_") and isinstance(f, FunctionType | classmethod | staticmethod))
    if len(inspect.signature(getattr(f, "__func__", f)).parameters) > 1
}
NOT_CALLED = {
    "Checkpointer.best": "the example has one metric",
    "Jitted.__init__": "users call fdl.jit",
    "TreeInfo.__init__": "users call TreeInfo.read",
}


@pytest.mark.usefixtures("plain_backend")
@pytest.mark.parametrize("name", METHODS)
def test_an_error_names_the_method_or_the_argument(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module, cls, method = METHODS[name]
    texts = [inspect.getdoc(vars(cls)[method]) or "", cls.__doc__]
    scope = vars(inspect.getmodule(cls)) | vars(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = probe(cls, method, next(t for t in texts if ">>>" in t), scope, monkeypatch)
    assert (found is None) == (name in NOT_CALLED), "the row of NOT_CALLED is missing or stale"
    assert not found


def test_the_law_sees_most_functions():
    assert len(FUNCTIONS) > 250 and len(NO_EXAMPLE) < 0.1 * len(FUNCTIONS)
    assert {*NO_EXAMPLE, *EXCEPTIONS} <= FUNCTIONS.keys()
