import re
from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "onnx": ["onnx", "onnxruntime", "onnxscript"],
    "openvino": ["openvino"],
    "safetensors": ["safetensors"],
    "spandrel": ["spandrel"],
}

setup(
    name="mlrn_arch",
    version=re.search(r'__version__ = "(.+)"', Path("mlrn_arch/version.py").read_text())[1],
    description="MLRN, a mixer-based local residual network for lightweight super-resolution, "
    "as a plugin for BasicSR",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["mlrn_arch", "mlrn_arch.*"]), "mlrn_arch.option_files"],
    package_dir={"mlrn_arch.option_files": "options"},
    py_modules=["mlrn_cli"],
    package_data={
        "mlrn_arch": ["py.typed", "weights/*.json", "weights/*.md", "weights/*.pth"],
        "mlrn_arch.option_files": ["*.yml", "*/*.yml", "*/*.sh"],
        "mlrn_arch.tools": ["*.md", "compare/*.csv"],
    },
    # BasicSR 1.4.2 cannot be built on 3.13: its setup.py ends in KeyError: '__version__'.
    python_requires=">=3.10,<3.13",
    install_requires=[
        "basicsr==1.4.2",  # the last release; compat.py repairs exactly this one
        "lmdb",
        "matplotlib",
        "numpy",
        "opencv-python>=4.13",  # writes colour profile and EXIF into 16-bit PNG
        "pillow",
        "pyyaml",
        "scikit-image",
        "torch>=2.6",  # loads checkpoints without running code from them by default
        "tifffile",
        "torchvision",
        "tqdm",
    ],
    extras_require={
        **EXTRAS,
        "all": sorted({package for packages in EXTRAS.values() for package in packages}),
        "wandb": ["wandb"],  # not in "all": it is of use to those with an account there
        "test": ["hypothesis", "mypy", "pytest", "ruff", "mlrn_arch[all]"],
    },
    entry_points={"console_scripts": ["mlrn = mlrn_cli:main"]},
)
