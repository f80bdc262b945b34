"""Fixtures of all training tests."""

from helpers.training import eager, few_texts  # noqa: F401
