"""Examples in docstrings become blocks of code on the site; in the sources they stay plain text."""

import re
from typing import Any

import griffe

# A doctest goes on to the next blank line; "Example::" owns the indented lines after it.
DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
LITERAL = re.compile(r"^Example::\n\n((?:    .*\n?|\n)+)", re.MULTILINE)


def fenced(text: str) -> str:
    """Put fences around the examples of a docstring."""
    text = LITERAL.sub(
        lambda m: f"```python\n{re.sub('(?m)^    ', '', m[1]).rstrip()}\n```\n", text
    )
    return DOCTEST.sub(lambda m: f"```pycon\n{m[0]}\n```", text)


class Examples(griffe.Extension):
    """Fence the examples of every object that griffe has read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
