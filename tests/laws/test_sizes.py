"""Files and functions of `fdl` stay short, and a file is tested where its name says."""

import ast
import statistics
from pathlib import Path

import fdl

ROOT = Path(fdl.__file__).parent
TESTS = Path(__file__).parents[1]
FILES = sorted(
    path for path in ROOT.rglob("*.py") if path.name not in ("__init__.py", "_version.py")
)

# Where a file, or all other files of a package, is tested, if no test file has its name.
TESTED_IN = {
    "_threefry.py": "random/test_samplers.py",
    "_compiler/_callbacks.py": "debug/test_callback.py",
    "_compiler/_associative_scan.py": "compiler/test_control_flow.py",
    "_compiler/_block_axes.py": "compiler/test_blocks.py",
    "_compiler/_block_code.py": "compiler/test_blocks.py",
    "_compiler/_block_cost.py": "compiler/test_blocks.py",
    "_compiler/_block_layers.py": "compiler/test_blocks.py",
    "_compiler/_block_ops.py": "compiler/test_blocks_rules.py",
    "_compiler/_block_pass.py": "compiler/test_blocks.py",
    "_compiler/_block_product_cost.py": "compiler/test_blocks_products.py",
    "_compiler/_block_products.py": "compiler/test_blocks_products.py",
    "_compiler/_block_sums.py": "compiler/test_blocks_rules.py",
    "_compiler/_regions.py": "compiler/test_blocks.py",
    "_compiler/_rows.py": "compiler/test_passes.py",
    "_compiler/_branches.py": "compiler/test_control_flow.py",
    "_compiler/_branches_traced.py": "compiler/test_control_flow.py",
    "_compiler/_closed_body.py": "compiler/test_scan_transformed.py",
    "_compiler/_counters.py": "compiler/test_dynamic_index.py",
    "_compiler/_custom_functions.py": "compiler/test_scan_transformed.py",
    "_compiler/_differentiable_ops.py": "compiler/test_scan_transformed.py",
    "_compiler/_digest.py": "compiler/test_dispatch.py",
    "_compiler/_fakes.py": "compiler/test_trace.py",
    "_compiler/_container.py": "compiler/test_export.py",
    "_compiler/_inductor.py": "compiler/test_routes.py",
    "_compiler/_interpreter.py": "compiler/test_routes.py",
    "_compiler/_kernels.py": "compiler/test_passes.py",
    "_compiler/_leafwise.py": "compiler/test_families.py",
    "_compiler/_library.py": "compiler/test_cache.py",
    "_compiler/_load_program.py": "compiler/test_export.py",
    "_compiler/_loop_gradient.py": "compiler/test_scan_transformed.py",
    "_compiler/_loop_rules.py": "compiler/test_scan_transformed.py",
    "_compiler/_loops.py": "compiler/test_scan_transformed.py",
    "_compiler/_order.py": "compiler/test_families.py",
    "_compiler/_package.py": "compiler/test_export.py",
    "_compiler/_refusals.py": "compiler/test_pieces.py",
    "_compiler/_lowerings.py": "compiler/test_passes.py",
    "_compiler/_merging.py": "compiler/test_families.py",
    "_compiler/_nans.py": "debug/test_nans.py",
    "_compiler/_patches.py": "compiler/test_scan_transformed.py",
    "_compiler/_program_file.py": "compiler/test_export.py",
    "_compiler/_scan_dynamo.py": "compiler/test_scan.py",
    "_compiler/_scan_eager.py": "compiler/test_scan.py",
    "_compiler/_scan_traced.py": "compiler/test_scan.py",
    "_compiler/_signature.py": "compiler/test_jit.py",
    "_compiler/_stored.py": "compiler/test_cache.py",
    "_compiler/_threads.py": "compiler/test_families.py",
    "_compiler/_user_lines.py": "compiler/test_purity.py",
    "_compiler/_while.py": "compiler/test_control_flow.py",
    "_compiler/_while_traced.py": "compiler/test_control_flow.py",
    "_differentiable/_functions.py": "transforms/test_second_order.py",
    "_differentiable/_norms.py": "transforms/test_second_order.py",
    "_dtensor.py": "parallel/test_step.py",
    "_kinds.py": "io/test_schema.py",
    "_modes.py": "interop/test_rules.py",
    "_numerics.py": "test_population.py",
    "_torch_compat.py": "random/test_checks.py",
    "_training/_loss.py": "training/test_step.py",
    "_training/_state.py": "training/test_step.py",
    "_training/_supervised.py": "training/test_step.py",
    "checkpointing/_folder.py": "checkpointing/test_checkpointer.py",
    "checkpointing/_lock.py": "checkpointing/test_checkpointer.py",
    "checkpointing/_retention.py": "checkpointing/test_checkpointer.py",
    "data": "data/test_batches.py",
    "data/_fashion_mnist_download.py": "data/test_fashion_mnist.py",
    "interop/_closures.py": "interop/test_as_module.py",
    "interop/_fill.py": "interop/test_flax.py",
    "interop/_flax_layers.py": "interop/test_flax.py",
    "interop/_keras_files.py": "interop/test_keras.py",
    "interop/_keys.py": "interop/test_random_functions.py",
    "interop/_random_layers.py": "interop/test_random_functions.py",
    "io/_compare.py": "io/test_tree_file.py",
    "io/_inspect.py": "io/test_tree_file.py",
    "io/_reader.py": "io/test_damage.py",
    "io/_safetensors.py": "io/test_damage.py",
    "losses": "losses/test_losses.py",
    "metrics": "metrics/test_metrics.py",
    "nn": "nn/test_layers.py",
    "nn/_model.py": "nn/test_compose.py",
    "optim": "optim/test_laws.py",
    "optim/_base.py": "optim/test_counts.py",
    "optim/_helpers.py": "optim/test_conditional_averaging.py",
    "optim/_lbfgs_direction.py": "optim/test_lbfgs.py",
    "optim/_lbfgs_state.py": "optim/test_lbfgs.py",
    "optim/_line_search.py": "optim/test_lbfgs.py",
    "optim/_loss_scale.py": "optim/test_16_bits.py",
    "optim/schedules": "optim/test_schedules.py",
    "parallel": "parallel/test_step.py",
    "random/_arithmetic.py": "random/test_samplers.py",
    "random/_counts.py": "random/test_discrete.py",
    "random/_loops.py": "random/test_ways_to_run.py",
    "random/_marsaglia_tsang.py": "random/test_gamma.py",
    "testing/_paths.py": "testing/test_module.py",
    "testing/_sides.py": "testing/test_module.py",
    "transforms": "transforms/test_per_sample.py",
    "tree": "tree/test_tree.py",
}


def named_after(path):
    """The test files whose name contains that of a file, in the folder of its package."""
    package = path.relative_to(ROOT).parts[0].strip("_") if path.parent != ROOT else ""
    name = path.stem.strip("_")
    return [test for test in (TESTS / package).rglob("test_*.py") if name in test.stem]


def row_of(path):
    """The row of the table for a file: its own, or that of its package."""
    name = path.relative_to(ROOT)
    return next((key for key in map(str, (name, name.parent)) if key in TESTED_IN), None)


def test_each_file_has_tests_that_are_found_by_its_name_or_by_the_table():
    without = [path for path in FILES if not named_after(path)]
    assert [path for path in without if row_of(path) is None] == []
    assert TESTED_IN.keys() == {row_of(path) for path in without}, "rows that nothing needs"
    assert [test for test in TESTED_IN.values() if not (TESTS / test).is_file()] == []


def lines_of_code(function, text):
    """Count the lines of a body, but for its docstring, comments and what is empty."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    if not body:
        return 0
    lines = text.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    return sum(not line.strip().startswith("#") for line in lines if line.strip())


def test_functions_are_short():
    lengths = [
        lines_of_code(node, text)
        for text in map(Path.read_text, FILES)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(lengths) > 500 and statistics.median(lengths) <= 7
    assert sum(length <= 23 for length in lengths) >= 0.9 * len(lengths)


def test_files_are_short():
    files = [*FILES, *TESTS.parent.glob("models/*.py"), *TESTS.parent.glob("train/**/*.py")]
    assert [path for path in files if path.read_text().count("\n") > 400] == []
