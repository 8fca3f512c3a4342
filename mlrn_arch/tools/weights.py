"""List the shipped checkpoints: what they were trained on and what they score.

PSNR [dB] and SSIM on Y, as `mlrn test` computes them, with the difference to the paper's figures.
--json also prints the stages of the training. A checkpoint is named mlrn://x4 in option files and
on the command line; in Python, `mlrn_arch.create_model("MLRN_x4", pretrained=True)` loads it.
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
        stages = len(entry["recipe"])
        lines = [f"{entry['iterations']:,} iterations in {stages} stages on {entry['data']}"]
        for dataset, score in entry["scores"].items():
            lines.append(f"{dataset:6} {score['PSNR']:.2f} / {score['SSIM']:.4f}")
            if paper := entry["paper"].get(dataset):
                psnr, ssim = (score[name] - paper[name] for name in ("PSNR", "SSIM"))
                lines[-1] += f"   paper {paper['PSNR']:.2f} / {paper['SSIM']:.4f}"
                lines[-1] += f"   difference {psnr:+.2f} / {ssim:+.4f}"
        lines += [entry["inherited"]] * ("inherited" in entry)
        lines += [f"licence {entry['licence']}", f"file    {entry['file']}"]
        name = f"{shipped.PREFIX}{entry['name'].removeprefix('MLRN_')}"
        print("\n".join(f"{name * (i == 0):16} {line}" for i, line in enumerate(lines)))
