"""What pyproject.toml cannot express: option files are a package that lies in options/."""

import shutil

from setuptools import find_packages, setup

shutil.rmtree("build/lib", ignore_errors=True)  # else modules removed since are installed again

setup(
    packages=[*find_packages(include=["mlrn_arch", "mlrn_arch.*"]), "mlrn_arch.option_files"],
    package_dir={"mlrn_arch.option_files": "options"},
)
