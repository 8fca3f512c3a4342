"""Kill a training run at random moments, again and again: no kill may lose a saved step.

    python tests/kill_and_resume.py --kills 100

The run saves after every step and validates after every second, so that many kills fall into a
save or a validation. It is always started by the same command, `mlrn train --auto_resume`. Each
start must continue from the newest state on disk and skip none. In the end the weights, the best
network and its score must equal those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import tempfile
import time
from pathlib import Path

import torch
from conftest import (
    make_fast,
    make_paired_data,
    make_train_options,
    start_training,
    write_yaml,
)


def kill_and_resume(folder: Path, kills: int, seed: int = 0) -> int:
    """Run the trial below `folder`; returns the steps trained. Raises AssertionError on a loss."""
    generator = random.Random(seed)
    options = make_fast(make_train_options(make_paired_data(folder)))
    options["val"].update(val_freq=2, save_best="psnr")
    options["logger"].update(save_checkpoint_freq=1, keep_last=3, use_tb_logger=False)
    options["train"]["total_iter"] = 1_000_000
    options["train"]["optim_g"]["lr"] = 0.05  # scores go up and down
    path = write_yaml(folder / "kill.yml", options)

    def newest() -> int:
        states = (folder / "experiments/tiny/training_states").glob("*.state")
        return max((int(path.stem) for path in states if path.stem.isdigit()), default=0)

    def resumed_from(output: str) -> int:
        found = re.search(r"Resuming training from epoch: \d+, iter: (\d+)", output)
        return int(found[1]) if found else 0

    in_a_save = 0
    for kill in range(1, kills + 1):
        saved = newest()
        process = start_training(path, folder)
        output = ""
        for line in process.stdout:
            output += line
            if "iter:" in line and "l_pix" in line:
                break
        time.sleep(generator.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, output
        assert resumed_from(output) == saved, f"{saved} was saved, but:\n{output}"
        assert "Skipping" not in output, output
        in_a_save += any((folder / "experiments/tiny").rglob("*.part.*"))
        print(f"kill {kill}: went on from {saved}, killed with {newest()} saved", flush=True)

    total = newest() + 5
    last = ["--force_yml", f"train:total_iter={total}"]
    output, _ = start_training(path, folder, *last).communicate()
    assert "End of training" in output and "Skipping" not in output, output
    assert not list((folder / "experiments").glob("*archived*"))
    (folder / "whole").mkdir()
    seldom = [*last, "logger:save_checkpoint_freq=1000000"]
    output, _ = start_training(path, folder / "whole", *seldom).communicate()
    assert "End of training" in output, output
    for file in ("net_g_latest.pth", "net_g_best.pth"):
        killed, whole = (
            torch.load(path / "experiments/tiny/models" / file, weights_only=True)
            for path in (folder, folder / "whole")
        )
        assert killed.get("best") == whole.get("best"), f"{killed['best']}, not {whole['best']}"
        for network in ("params", "params_ema"):
            for name, tensor in whole[network].items():
                assert torch.equal(tensor, killed[network][name]), f"{file}: {name} differs"
    print(
        f"{kills} kills over {total} steps, {in_a_save} of them in the middle of a save: nothing "
        "saved was lost. The last weights, the best weights (of iteration "
        f"{whole['best']['iter']}) and their score equal those of a run without kills, bit by bit."
    )
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        kill_and_resume(Path(work), arguments.kills, arguments.seed)
