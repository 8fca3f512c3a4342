"""List the shipped checkpoints: what they were trained on and what they score.

PSNR [dB] and SSIM on Y, as `mlrn test` computes them, with the difference to the paper's figures.
--json has the stages of the training, in order.
Option files take a checkpoint as `pretrain_network_g: mlrn://x4`, Python code as
`mlrn_arch.create_model("MLRN_x4", pretrained=True)`.
"""

from __future__ import annotations

import argparse
import json

from mlrn_arch import shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn weights` on `parser`."""
    parser.add_argument("--json", action="store_true", help="print all that is known, as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the list."""
    known = [shipped.info(name) for name in shipped.names()]
    if args.json:
        print(json.dumps(known, indent=2))
        return
    for entry in known:
        name = f"{shipped.PREFIX}{entry['name'].removeprefix('MLRN_')}"
        stages = len(entry["recipe"])
        print(f"{name:16} {entry['iterations']:,} iterations in {stages} stages on {entry['data']}")
        for dataset, score in entry["scores"].items():
            line = f"{score['PSNR']:.2f} / {score['SSIM']:.4f}"
            if paper := entry["paper"].get(dataset):
                line += f"   paper {paper['PSNR']:.2f} / {paper['SSIM']:.4f}"
                line += f"   difference {score['PSNR'] - paper['PSNR']:+.2f}"
                line += f" / {score['SSIM'] - paper['SSIM']:+.4f}"
            print(f"{'':16} {dataset:6} {line}")
        if inherited := entry.get("inherited"):
            print(f"{'':16} {inherited}")
        print(f"{'':16} licence {entry['licence']}")
        print(f"{'':16} file    {entry['file']}")
