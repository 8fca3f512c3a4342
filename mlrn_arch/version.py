"""The version, alone: a module that needs it need not import the whole package."""

__version__ = "0.2.0"
