"""Tracing imports neither Dynamo nor Inductor, unless somebody asks for them."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fdl._compiler import _deferred
from fdl._compiler._deferred import DYNAMO, INDUCTOR, StandIn, deferred_imports
from tests.workers.deferred_worker import CASES, PROGRAMS

BOTH = [DYNAMO, INDUCTOR]
EXPECTED = {
    "loaded": [],
    **{name: [[], True] for name in PROGRAMS},
    "asked_for": [BOTH, True, "SourceFileLoader", True, True],
    "attribute": [True, BOTH],
    "thread": [BOTH, [["LocalSource", False]]],
    "set_in_a_trace": [BOTH, False],
    "side_by_side": [True, []],
    "failing": ["2", []],
    "nothing_kept": [False, True, True],
    "planned": [[], True, True],
}
pytestmark = [
    pytest.mark.skipif(not _deferred.HAS_CACHE, reason="torch 2.11 keeps no programs"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the worker forks"),
]


@cache
def results() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.workers.deferred_worker"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("case", list(EXPECTED))
def test_imports_what_is_asked_for(case: str) -> None:
    assert results()[case] == EXPECTED[case]


def test_a_module_that_does_not_exist_is_not_found() -> None:
    assert "No module named 'torch._dynamo.no_such_module'" in results()["missing"]
    assert {"loaded", *CASES} == {*EXPECTED, "missing"}


def test_settings_are_those_of_torch() -> None:
    import torch._dynamo
    import torch._inductor.compiler_bisector

    for config, settings in (
        (torch._dynamo.config, _deferred.DYNAMO_SETTINGS),
        (torch._inductor.config, _deferred.INDUCTOR_SETTINGS),
    ):
        values: Any = config
        assert settings == {key: values._config[key].default for key in settings}
    level = getattr(torch._inductor.config, "effective_provenance_tracking_level", None)
    assert level is None or level() == 0  # torch 2.13 has no such function
    bisector = torch._inductor.compiler_bisector.CompilerBisector
    assert not bisector.disable_subsystem("aot_eager_decomp_partition", "decomposition")


def test_modules_that_are_imported_stay() -> None:
    import torch._dynamo
    import torch._inductor  # noqa: F401

    with deferred_imports():
        assert not isinstance(sys.modules[DYNAMO], StandIn)
        assert not isinstance(sys.modules[INDUCTOR], StandIn)
