"""Writing files and folders so that they appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a hidden path beside `path`; what is written there replaces `path` at the end.

    After an error nothing is left of it, and what was at `path` before is untouched. A folder
    may be made there too, if `path` does not exist.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem[:40]}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        if part.is_file():
            with open(part, "rb+") as file:
                os.fsync(file.fileno())  # the rename must not reach the disk before the content
        os.replace(part, path)
    except BaseException:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
        raise
