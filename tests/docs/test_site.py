"""The documentation site: built strictly, then read page by page in a browser."""

import fcntl
import functools
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urldefrag, urljoin

import pytest

from tests.laws import test_docstrings as test_docs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

for needed in ("mkdocs", "mkdocstrings", "mkdocs_jupyter", "material"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed", allow_module_level=True)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the built site; workers of xdist share it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (base / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for the first one, then find its site
        if not (base / "site").exists():
            build(base / "unfinished").rename(base / "site")
    return base / "site"


def build(folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Found(HTMLParser):
    """Addresses and anchors of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name == "id":
                self.anchors.add(value)


@pytest.fixture(scope="session")
def pages(site):
    """Map the address of each page to what is in it; 404.html is for servers."""
    found = {}
    for path in sorted(site.rglob("*.html")):
        address = path.relative_to(site).as_posix()
        if address != "404.html":
            found[address] = Found(path.read_text())
    return found


@pytest.mark.slow
def test_every_link_leads_somewhere(site, pages):
    broken = []
    for address, page in pages.items():
        for link in page.links:
            if re.match(r"\w+:", link):
                continue  # another host's, or data
            target, anchor = urldefrag(urljoin(f"/{address}", link))
            target = unquote(target).lstrip("/")
            exists = (site / target).is_file()  # as without a server
            known = target not in pages or not anchor or unquote(anchor) in pages[target].anchors
            if not (exists and known):
                broken.append(f"{address}: {link}")
    assert len(pages) > 30 and not broken


def test_documented_names_are_the_public_names(pages):
    reference = {
        address.removeprefix("reference/").removesuffix(".html"): page
        for address, page in pages.items() if address.startswith("reference/")
    }  # fmt: skip
    anchors = {
        name: {a for a in page.anchors if re.fullmatch(rf"{re.escape(name)}\.\w+", a)}
        for name, page in reference.items()
    }
    for name, found in anchors.items():
        listed = {f"{name}.{each}" for each in test_docs.MODULES[name].__all__}
        assert found == listed, name
    # What has no page of its own is documented under the package that exports it.
    objects = {
        id(getattr(test_docs.MODULES[name], each)) for name in reference
        for each in test_docs.MODULES[name].__all__
    }  # fmt: skip
    for name, module in test_docs.MODULES.items():
        for each in module.__all__ if name.startswith("fdl") else ():
            thing = getattr(module, each)
            assert isinstance(thing, ModuleType) or id(thing) in objects, f"{name}.{each}"


def test_examples_in_docstrings_are_blocks_of_code(site):
    spec = importlib.util.spec_from_file_location("_docstrings", ROOT / "docs" / "_docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.fenced("Add.\n\n>>> 1 + 1\n2") == "Add.\n\n```pycon\n>>> 1 + 1\n2\n```"
    text = "Add.\n\nExample::\n\n    a = 1\n\n    b = 2\n"
    assert module.fenced(text) == "Add.\n\n```python\na = 1\n\nb = 2\n```\n"
    page = (site / "reference" / "fdl.random.html").read_text()
    assert page.count('class="language-pycon') >= 10 and "<blockquote>" not in page


@pytest.fixture(scope="session")
def host(site):
    """Serve the site."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, host):
    """A tab of a phone's width, and what goes wrong in it."""
    tab = browser.new_page(viewport={"width": 360, "height": 740})
    wrong = []
    tab.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda request: request.url.startswith((host, "data:", "blob:"))
           or wrong.append(f"left the host: {request.url}"))  # fmt: skip
    tab.wrong = wrong
    yield tab
    tab.close()


def test_every_page_loads_and_fits_a_phone(tab, host, pages):
    for address in pages:
        answer = tab.goto(host + address, wait_until="load")
        assert answer.status == 200, address
        width = tab.evaluate("document.documentElement.scrollWidth")
        if width > 360:
            tab.wrong.append(f"{address}: {width} px wide")
    assert not tab.wrong


def test_search_finds_vmap(tab, host):
    tab.set_viewport_size({"width": 1280, "height": 800})
    tab.goto(host)
    tab.click("input.md-search__input")
    tab.keyboard.type("vmap", delay=50)  # the site listens to keys, and loads its index meanwhile
    tab.wait_for_selector(".md-search-result__link", timeout=20_000)
    assert "vmap" in tab.inner_text(".md-search-result__list") and not tab.wrong


def test_the_site_works_when_opened_as_a_file(browser, site):
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.goto(f"file://{site}/index.html")
    tab.click(".md-content a[href='ideas.html']")
    assert tab.url == f"file://{site}/ideas.html" and "ideas" in tab.title()
    tab.click("input.md-search__input")
    tab.keyboard.type("vmap", delay=50)
    tab.wait_for_selector(".md-search-result__link", timeout=20_000)
    assert "vmap" in tab.inner_text(".md-search-result__list")
    tab.close()


def test_code_can_be_copied_and_the_palette_changed(tab, host):
    tab.goto(host + "ideas.html")
    blocks = tab.locator(".md-content .highlight").count()
    tab.wait_for_selector("button[data-md-type=copy]", state="attached")
    assert tab.locator("button[data-md-type=copy]").count() == blocks > 5
    scheme = "document.body.getAttribute('data-md-color-scheme')"
    before = tab.evaluate(scheme)
    tab.locator("form[data-md-component=palette] label:visible").click()
    assert tab.evaluate(scheme) != before and not tab.wrong
