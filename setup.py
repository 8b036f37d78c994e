"""For tools that call setup.py: everything is in pyproject.toml and nothing is compiled."""

from setuptools import setup

setup()
