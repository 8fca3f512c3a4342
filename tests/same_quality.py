"""Compare the quality that SRModel, FastSRModel and FastSRModel with Muon reach.

    pip install -e ".[test]" && mlrn demo && python tests/same_quality.py mlrn_demo

Trains each of them with three seeds on the demo's data and prints the PSNR of the demo's test
photographs. The models draw different random crops, as different seeds do. With the same optimizer
their means should therefore differ by no more than the seeds do.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path

from conftest import mlrn

from mlrn_arch import schema


def score(folder: Path, model: str, optimizer: str, seed: int, forced: list[str]) -> float:
    """Train and test one network; returns its PSNR in dB."""
    name = f"{model}_{optimizer}_{seed}"
    force = [f"name={name}", f"model_type={model}", f"train:optim_g:type={optimizer}"]
    force += [f"manual_seed={seed}", *forced]
    if model == "SRModel":  # which does not read FastSRModel's own options
        own = [place for place, option in schema.declared().items() if "model" in option]
        force += [f"{':'.join(place)}=none" for place in own]
    result = mlrn("train", "-opt", "train_demo.yml", "--force_yml", *force, cwd=folder)
    checkpoint = f"path:pretrain_network_g=experiments/{name}/models/net_g_latest.pth"
    force = [f"name={name}", checkpoint]
    result = mlrn("test", "-opt", "test_MLRN.yml", "--force_yml", *force, cwd=folder)
    found = re.search(r"^\w+ +\d+ +(\d+\.\d+)", result.stdout, re.M)
    if not found:
        sys.exit(result.stdout)
    return float(found[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what `mlrn demo` wrote")
    parser.add_argument("--iterations", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--precision", default="fp32", help="of FastSRModel; default: %(default)s")
    args = parser.parse_args()
    forced = [f"train:total_iter={args.iterations}", f"train:precision={args.precision}"]
    forced += [f"train:scheduler:periods=[{args.iterations}]"]
    for row in ("SRModel", "FastSRModel", "FastSRModel, Muon"):
        model, _, other = row.partition(", ")
        scores = [score(args.folder, model, other or "Adam", seed, forced) for seed in range(3)]
        listed = ", ".join(f"{value:.3f}" for value in scores)
        mean, spread = statistics.mean(scores), statistics.stdev(scores)
        print(
            f"{row:17}  {listed}: mean {mean:.3f}, standard deviation {spread:.3f} dB", flush=True
        )
