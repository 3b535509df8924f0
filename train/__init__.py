"""The recipes of the course as commands: `python -m train RECIPE`."""
