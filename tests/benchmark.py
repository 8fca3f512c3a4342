"""Time training from one option file with stock BasicSR and with the file's own model type.

    python tests/benchmark.py -opt options/train_MLRN_x4.yml

Stock means SRModel on PairedImageDataset; everything else is as in the file. The two sides run in
processes of their own and take turns, so a busy machine slows both. The figures are medians over
the rounds. Nothing is written.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import resource
import signal
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from tqdm import tqdm

from mlrn_arch import errors, machine, options, plugins, schema
from mlrn_arch.errors import UserError
from mlrn_arch.train import replacements

STOCK = [
    "model_type=SRModel",
    "datasets:train:type=PairedImageDataset",
    "train:optim_g:type=Adam",
    # What SRModel does not read is left out.
    *(
        f"{':'.join(place)}=none"
        for place, option in schema.declared().items()
        if "model" in option
    ),
]


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = plugins.parser("benchmark.py", __doc__)
    add = parser.add_argument
    add("-opt", required=True, metavar="FILE", help="option file of a training run")
    add("--force_yml", **options.FORCE_YML, help="as for `mlrn train`")
    add(
        "--stock_yml",
        **options.FORCE_YML,
        help="options for stock alone, such as LMDBs of PNGs",
    )
    add("--rounds", type=int, default=5, help="turns of each side (default: %(default)s)")
    add("--steps", type=int, default=10, help="training steps per turn (default: %(default)s)")
    add("--loader", action="store_true", help="time the data loaders alone, without training")
    parser.epilog = """example, a batch that suits a small CPU:
  python tests/benchmark.py -opt options/train_MLRN_x4.yml \\
      --force_yml datasets:train:gt_size=192 datasets:train:batch_size_per_gpu=16"""
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Time both sides and print the table.

    Raises:
        UserError: The option file has faults, or one of the two processes ended.
    """
    context = multiprocessing.get_context("spawn")
    sides: dict[str, Connection] = {}
    for name, forced in (("stock", [*STOCK, *args.stock_yml]), ("this file", [])):
        sides[name], other = context.Pipe()
        arguments = ["-opt", args.opt, *(f"--import={source}" for source in args.imports)]
        if entries := [*args.force_yml, *forced]:  # argparse refuses the flag without
            arguments += ["--force_yml", *entries]
        # No daemon: it has loader workers. It ends when this process closes the pipe, or is gone.
        context.Process(target=_side, args=(other, arguments, args.loader)).start()
        other.close()
    about = {name: _receive(side) for name, side in sides.items()}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in tqdm(range(-1, args.rounds), desc="rounds", disable=None):
        for name, side in sides.items():
            side.send(args.steps)
            result = _receive(side)
            if turn >= 0:  # the first one warms up
                turns[name].append(result)

    print(f"{about['stock']['device']}, torch {about['stock']['torch']}: batch of", end=" ")
    print(f"{about['stock']['batch']}, medians of {args.rounds} rounds of {args.steps} steps")
    columns = ["samples/s", "steps/s", "ms in data", "ms in step", "peak GB"]
    print(f"{'':40}" + "".join(f"{column:>12}" for column in columns))
    for name, results in turns.items():
        row = [statistics.median(result[column] for result in results) for column in columns]
        label = f"{name}, {about[name]['what']}"
        print(f"{label:40}" + "".join(f"{value:12.2f}" for value in row))
    pairs = zip(turns["this file"], turns["stock"], strict=True)
    for side in sides.values():
        side.close()
    ratios = [fast["samples/s"] / stock["samples/s"] for fast, stock in pairs]
    print(f"this file / stock: {statistics.median(ratios):.2f}", end=" ")
    print(f"(single rounds {min(ratios):.2f} to {max(ratios):.2f})")


def _receive(side: Connection) -> dict[str, Any]:
    try:
        answer = side.recv()
    except EOFError:
        raise UserError("one of the two processes ended; what it printed says why") from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def _side(connection: Connection, arguments: list[str], loader_only: bool) -> None:
    """Set up one side as the pipeline does, then train as many steps as is asked for."""
    from basicsr import train as pipeline  # here, for only the two sides need it

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's
    try:
        opt, _, _ = options.read("train", arguments)
    except UserError as error:
        connection.send(error)
        return
    logger = logging.getLogger("basicsr")
    logger.setLevel("ERROR")
    for name, replacement in replacements(opt, {}).items():
        setattr(pipeline, name, replacement)
    torch.backends.cudnn.benchmark = True  # as the pipeline
    train = opt["datasets"]["train"]
    opt["datasets"] = {"train": train}
    loader, sampler, *_ = pipeline.create_train_val_dataloader(opt, logger)
    model = None if loader_only else pipeline.build_model(opt)
    if train.get("prefetch_mode") == "cuda":
        prefetcher = pipeline.CUDAPrefetcher(loader, opt)
    else:
        prefetcher = pipeline.CPUPrefetcher(loader)
    on_gpu = opt["num_gpu"] > 0
    device = machine.name_of(torch.device("cuda" if on_gpu else "cpu"))
    what = train["type"] if loader_only else opt["model_type"]
    about = {"device": device, "torch": torch.__version__, "batch": loader.batch_size}
    connection.send({**about, "what": what})

    done = 0
    while True:
        try:
            steps = connection.recv()
        except EOFError:
            return
        if loader_only:  # what the workers made ahead, while the other side had its turn
            for _ in range(loader.num_workers * (loader.prefetch_factor or 0)):
                prefetcher.next()
        in_data, start = 0.0, time.perf_counter()
        for _ in range(steps):
            before = time.perf_counter()
            batch = prefetcher.next()
            if batch is None:
                sampler.set_epoch(sampler.epoch + 1)
                prefetcher.reset()
                batch = prefetcher.next()
            in_data += time.perf_counter() - before
            done += 1
            if model:
                model.update_learning_rate(done)
                model.feed_data(batch)
                model.optimize_parameters(done)
        if model:
            model.get_current_log()  # in training this comes every logger:print_freq steps
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if on_gpu:
            peak = torch.cuda.max_memory_allocated()
        else:  # Linux counts in KiB, macOS in bytes
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        result = {
            "samples/s": steps * loader.batch_size / seconds,
            "steps/s": steps / seconds,
            "ms in data": in_data / steps * 1e3,
            "ms in step": (seconds - in_data) / steps * 1e3,
            "peak GB": peak / 1e9,
        }
        if loader_only:  # the workers fill their queues first: the other side's turn is its own
            time.sleep(seconds / steps * loader.num_workers * (loader.prefetch_factor or 0))
        connection.send(result)


if __name__ == "__main__":
    sys.exit(errors.run("benchmark.py", lambda: run(parse_args())))
