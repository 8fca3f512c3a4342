"""Lets pip build BasicSR 1.4.2 on Python 3.13 and later: `PYTHONPATH=$PWD/.build_basicsr pip ...`.

BasicSR's setup.py calls `exec` in a function and then reads `locals()["__version__"]`. Since 3.13
(PEP 667) `exec` fills a copy of the local variables; this one fills the caller's own, as before.
"""

import builtins
import sys


def exec_in_caller(code, *scopes, run=exec, **keywords):
    if not scopes and not keywords:
        caller = sys._getframe(1)
        scopes = caller.f_globals, caller.f_locals
    run(code, *scopes, **keywords)


if sys.version_info >= (3, 13):
    builtins.exec = exec_in_caller
