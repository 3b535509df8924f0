"""Keeps the recipes from being imported as test files: `recipes.py` runs each by itself."""

collect_ignore_glob = ["with_*.py"]
