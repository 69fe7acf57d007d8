"""The version, which no module has to import the whole package for."""

__version__ = "0.1.0"
