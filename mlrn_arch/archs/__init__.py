"""The networks: importing this package registers every `*_arch.py` in it with BasicSR."""

from importlib import import_module
from pkgutil import iter_modules

# BasicSR's own convention: a file named *_arch.py is found, imported and thereby registered.
for _module in iter_modules(__path__):
    if _module.name.endswith("_arch"):
        import_module(f"{__name__}.{_module.name}")
