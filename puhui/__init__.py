"""Puhui (普惠): virtual accelerator cards cut to the size a piece of model code needs."""

from importlib.metadata import version as _version

__version__ = _version("puhui")
