"""Puts into the site what lies outside docs/: notebooks, reference pages, changelog."""

import importlib
import inspect
import json
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.structure.toc import get_toc

import fdl

sys.path.insert(0, str(Path(__file__).parent))
import _graph

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
ROOT_PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def documented() -> dict[str, ModuleType]:
    """Map the modules that get a page: `fdl`, and those with a name that their package lacks."""
    found = {"fdl": fdl}
    for info in pkgutil.walk_packages(fdl.__path__, "fdl."):
        if "._" in info.name:
            continue
        module = importlib.import_module(info.name)
        package = importlib.import_module(info.name.rpartition(".")[0])
        if set(module.__all__) - set(package.__all__):
            found[info.name] = module
    return found


# The names of a long page, in the order in which a reader looks for them; others are alphabetical.
GROUPS = {
    "fdl": {
        "Training": "TrainState supervised StatefulLoss train_step eval_step averaged update_bn"
        " summary",
        "Compiling": "jit disable_jit Jitted Report",
        "Programs as files": "export load_program",
        "Loops and branches": "scan map fori_loop while_loop cond switch associative_scan",
        "Modules": "nn losses metrics optim data random tree transforms population parallel debug"
        " interop io checkpointing testing",
    },
    "fdl.nn": {
        "Models": "Model StatefulModel Layer",
        "Composing": "sequential parallel concat residual tied capture",
        "Affine layers": "linear embedding conv1d conv2d conv3d conv_transpose1d conv_transpose2d",
        "Pools and shapes": "max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d"
        " adaptive_avg_pool2d adaptive_max_pool2d flatten rearrange reduce",
        "Norms and dropout": "layer_norm rms_norm group_norm instance_norm batch_norm dropout"
        " dropout2d",
        "Sequences": "rnn gru lstm rnn_cell gru_cell lstm_cell multihead_attention"
        " transformer_encoder_layer",
        "Activations": "relu leaky_relu gelu silu sigmoid tanh softplus softmax log_softmax",
        "Dtypes and initial values": "Policy with_policy init",
    },
    "fdl.losses": {
        "Of classes and probabilities": "cross_entropy nll binary_cross_entropy_with_logits kl_div",
        "Of numbers": "mse l1 huber smooth_l1 squared_loss",
        "Of vectors": "cosine_embedding triplet_margin",
        "Of parameters": "l2_penalty",
    },
    "fdl.metrics": {
        "Metrics": "mean accuracy top_k_accuracy confusion_matrix precision_recall_f1"
        " calibration_error per_batch",
        "What they return": "Mean ConfusionMatrix PrecisionRecallF1 CalibrationError",
    },
    "fdl.optim": {
        "Optimizers of torch.optim": "sgd adam adamw adamax nadam radam adagrad adadelta rmsprop"
        " rprop asgd adafactor muon lbfgs",
        "Optimizers beyond torch": "lion lamb lars adan schedule_free_sgd schedule_free_adamw sam",
        "Composing": "chain masked freeze multi_transform leafwise",
        "Transformations of gradients": "trace scale scale_by_learning_rate add_decayed_weights"
        " scale_by_adam scale_by_adamax scale_by_nadam scale_by_radam scale_by_adagrad"
        " scale_by_adadelta scale_by_rms scale_by_muon scale_by_lion scale_by_adan"
        " scale_by_trust_ratio clip clip_by_global_norm adaptive_grad_clip centralize add_noise",
        "Around an optimizer": "accumulate apply_if_finite lookahead loss_scale loss_scale_of"
        " reduce_on_plateau params_ema schedule_free schedule_free_params",
        "States and rates": "Optimizer State apply_updates global_norm slots hyperparams"
        " with_hyperparams Schedule schedules from_torch to_torch",
    },
    "fdl.random": {
        "Keys": "Key Shape key split fold_in",
        "Floating numbers": "uniform normal truncated_normal exponential laplace logistic gumbel"
        " cauchy gamma beta dirichlet t",
        "Integers and elements": "bits randint bernoulli rademacher categorical poisson binomial"
        " choice permutation",
        "Vectors and matrices": "multivariate_normal ball orthogonal",
    },
}


def reference(name: str, module: ModuleType) -> str:
    """Write the page of a module: its docstring, a line for each of its names, and each of them."""
    groups = {title: names.split() for title, names in GROUPS.get(name, {}).items()}
    groups = groups or {"": list(module.__all__)}
    parts = [f"# {name}", f"::: {name}\n    options: {{members: false, show_root_heading: false}}"]
    parts += [table(name, module, title, names) for title, names in groups.items()]
    parts += [
        entry(f"{name}.{each}", getattr(module, each))
        for names in groups.values()
        for each in names
    ]
    return "\n\n".join(parts) + "\n"


def table(name: str, module: ModuleType, title: str, names: list[str]) -> str:
    """Write a table of names, each with the first line of its docstring."""
    rows = [f"| {title or 'name'} | |", "|---|---|"]
    for each in names:
        summary = (inspect.getdoc(getattr(module, each)) or "").partition("\n")[0]
        rows.append(f"| [`{each}`](#{name}.{each}) | {summary.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def entry(path: str, thing: Any) -> str:
    """Write the entry of a name: mkdocstrings does, but for modules and for what is torch's."""
    short = path.rpartition(".")[2]
    if isinstance(thing, ModuleType):
        return f"## {short} {{#{path}}}\n\nA module: [`{path}`]({path}.md)."
    foreign = not getattr(thing, "__module__", "").startswith("fdl")
    if inspect.isroutine(thing) and foreign:
        return f"## {short} {{#{path}}}\n\nPyTorch's own `torch.nn.functional.{short}`."
    return f"::: {path}"


def how_it_is_built() -> str:
    """Write the page of the maps that stand beside the code, with the graph of the modules."""
    library = (ROOT / "fdl" / "README.md").read_text().partition("\n")[2]
    compiler = (ROOT / "fdl" / "_compiler" / "README.md").read_text()
    introduction, table, rest = library.partition("\n| from the top")
    links = {
        name.removeprefix("fdl."): f"reference/{name}.html"
        for name in documented()
        if name.count(".") == 1
    }
    graph = f'<div class="scroll">\n{_graph.svg(links)}\n</div>'
    legend = (
        "An arrow leads from a unit to one that it imports; what follows from other arrows is left"
        " out. Public packages are coloured and lead to their reference pages."
    )
    parts = ["# How it is built", introduction, graph, legend, table + rest, f"#{compiler}"]
    page = "\n\n".join(part.strip() for part in parts) + "\n"
    return page.replace("](_compiler/README.md)", "](#how-a-jitted-call-runs)")


def on_config(config: Any) -> Any:
    """Fill in the navigation."""
    for section in config.nav:
        if "Notebooks" in section:
            section["Notebooks"] += [{title(path): f"notebooks/{path.name}"} for path in NOTEBOOKS]
        if "Reference" in section:
            section["Reference"] += [{name: f"reference/{name}.md"} for name in documented()]
    return config


def title(notebook: Path) -> str:
    """Take a notebook's first heading."""
    cells = json.loads(notebook.read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    return heading[1].replace("`", "") if heading else notebook.stem


@event_priority(100)  # before mkdocs-jupyter, which looks for notebooks among the files
def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for uri, name in ROOT_PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for path in NOTEBOOKS:
        # Not File.generated: mkdocs-jupyter wraps the file, and then its content is not found.
        site, pretty = config.site_dir, config.use_directory_urls
        files.append(File(f"notebooks/{path.name}", str(ROOT), site, pretty))
    files.append(File.generated(config, "built.md", content=how_it_is_built()))
    for name, module in documented().items():
        text = reference(name, module)
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **kwargs: Any) -> str:
    """Links that lead out of docs/ on a disk lead to pages of the site here."""
    if page.file.src_uri in ROOT_PAGES:
        markdown = markdown.replace("](docs/", "](").replace("](notebooks)", "](curriculum.md)")
        return markdown.replace("](fdl/README.md)", "](built.md)")

    def inside(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        # A notebook that is not there yet is named without a link.
        return f"[{text}]({target})" if files.get_file_from_path(target) else text

    return re.sub(r"\[([^\]]*)\]\(\.\./(notebooks/\w+\.ipynb)\)", inside, markdown)


def sibling(match: re.Match[str]) -> str:
    """Link to another notebook, if it is there."""
    name, anchor, text = match.groups(default="")
    there = any(path.stem == name for path in NOTEBOOKS)
    return f'<a href="{name}.html{anchor}">{text}</a>' if there else text


def headings(html: str) -> list[Any]:
    """List a notebook's headings, nested; those of mkdocs-jupyter lose the code in them."""
    top: list[Any] = []
    for level, anchor, text in re.findall(r'<h([1-3]) id="([^"]*)">(.*?)<a class="anchor', html):
        name = re.sub("<[^>]*>", "", text)
        found = {"level": int(level), "id": anchor, "name": name, "html": name, "children": []}
        siblings = top
        while siblings and siblings[-1]["level"] < found["level"]:
            siblings = siblings[-1]["children"]
        siblings.append({**found, "attrs": {}, "data-toc-label": ""})
    return top


def on_page_content(html: str, page: Page, **kwargs: Any) -> str:
    """Links among notebooks, and from them to pages, have the site's addresses."""
    if page.file.src_uri.endswith(".ipynb"):
        page.toc = get_toc(headings(html))
        html = re.sub(r'<a href="(\w+)\.ipynb(#[^"]*)?">(.*?)</a>', sibling, html)
        html = re.sub(r'href="\.\./docs/([\w/-]+)\.md(#[^"]*)?"', r'href="../\1.html\2"', html)
    # Wide tables scroll by themselves; the page does not.
    html = re.sub(r"<table(?![^>]*highlighttable)", r'<div class="scroll"><table', html)
    return html.replace("</table>", "</table></div>")
