"""Functional deep learning in PyTorch: pure functions, explicit state, explicit keys."""

__version__ = "0.1.0"
