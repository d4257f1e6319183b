"""Build of the package; everything static is in pyproject.toml."""

from setuptools import setup

setup()
