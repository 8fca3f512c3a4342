"""Building: what the wheel holds, and the repair that builds BasicSR on Python 3.13."""

import email
import os
import shutil
import subprocess
import sys
import zipfile

from conftest import REPOSITORY

BUILD = "import setuptools.build_meta as backend; backend.build_wheel('dist')"


def test_the_wheel_holds_the_package_and_nothing_removed(tmp_path):
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "mlrn_cli.py"):
        shutil.copy(REPOSITORY / file, tmp_path)
    for folder in ("mlrn_arch", "options"):
        ignore = shutil.ignore_patterns("__pycache__", "option_files")
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=ignore)
    wanted = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.*")}
    wanted -= {"setup.py", "pyproject.toml", "README.md"}
    (tmp_path / "build/lib/mlrn_arch").mkdir(parents=True)
    (tmp_path / "build/lib/mlrn_arch/removed.py").touch()  # as an earlier `pip install .` left it

    command = [sys.executable, "-c", BUILD]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Deprecat" not in done.stderr and "SetuptoolsWarning" not in done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        header = email.message_from_bytes(archive.read(metadata))
    assert names == {name.replace("options/", "mlrn_arch/option_files/", 1) for name in wanted}
    assert header["License-Expression"] == "Apache-2.0"
    assert header["Requires-Python"] == ">=3.10"


def test_exec_sets_variables_of_its_caller_while_basicsr_is_built():
    script = "def f(): exec('found = 1'); return locals()['found']\nprint(f())\n"
    script += "scope = {}; exec('found = 2', scope); print(scope['found'])"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / ".build_basicsr")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE)
    assert done.stdout.split() == [b"1", b"2"]
