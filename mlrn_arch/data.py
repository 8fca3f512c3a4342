"""Training data that keeps a fast GPU fed and continues exactly where a run stopped."""

from __future__ import annotations

import contextlib
import random
import signal
import struct
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from basicsr.data import build_dataloader as build_stock_dataloader
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.data.transforms import augment, paired_random_crop
from basicsr.utils.file_client import FileClient, LmdbBackend
from basicsr.utils.registry import DATASET_REGISTRY

from mlrn_arch.errors import UserError


@DATASET_REGISTRY.register()
class FastPairedImageDataset(PairedImageDataset):
    """`PairedImageDataset` that crops before it converts, and reads only the crop if it can.

    Takes the same options. In training it gives `lq` and `gt` as uint8, (3, h, w), RGB, which
    `FastSRModel` turns into the same float values on the device. A value of an LMDB that is an
    uncompressed BMP (`mlrn prepare --format bmp`) is never decoded: the crop is copied out of it.
    """

    file_client: Any

    def __getitem__(self, index: int) -> dict[str, Any]:
        opt = self.opt
        if opt["phase"] != "train" or opt.get("color") == "y" or self.mean or self.std:
            return super().__getitem__(index)
        if self.file_client is None:
            self.file_client = FileClient(self.io_backend_opt.pop("type"), **self.io_backend_opt)
        paths = self.paths[index]
        with contextlib.ExitStack() as stack:
            pair = (_image(self._value(stack, key, paths[f"{key}_path"])) for key in ("gt", "lq"))
            crops = paired_random_crop(*pair, opt["gt_size"], opt["scale"], paths["gt_path"])
            crops = [np.ascontiguousarray(crop) for crop in crops]  # what was a view of the LMDB
        images = augment(crops, opt["use_hflip"], opt["use_rot"])
        gt, lq = (torch.from_numpy(i[..., ::-1].transpose(2, 0, 1).copy()) for i in images)
        return {"lq": lq, "gt": gt, **paths}

    def _value(self, stack: contextlib.ExitStack, key: str, path: str) -> bytes | memoryview:
        """An encoded image; of an LMDB a view, valid while `stack` is open, that copies nothing."""
        if not isinstance(self.file_client.client, LmdbBackend):
            return self.file_client.get(path, key)
        environment = self.file_client.client._client[key]
        value = stack.enter_context(environment.begin(buffers=True)).get(path.encode("ascii"))
        if value is None:
            raise KeyError(f"the LMDB has no {path}")
        return value


def _image(value: bytes | memoryview) -> np.ndarray:
    """Decode an image, (h, w, 3), BGR; of an uncompressed 24-bit BMP give a view instead."""
    if value[:2] == b"BM":
        start, width, height, bits, compression = struct.unpack_from("<10xi4xii2xHi", value)
        if (bits, compression) == (24, 0) and height > 0:  # the bottom row first
            stride = (width * 3 + 3) // 4 * 4  # each row is padded to four bytes
            rows = np.frombuffer(value, np.uint8, stride * height, start).reshape(height, stride)
            return rows[::-1, : width * 3].reshape(height, width, 3)
    image = cv2.imdecode(np.frombuffer(value, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("it is no image, or a broken one")
    return image


class ResumableSampler(EnlargedSampler):
    """`EnlargedSampler` that can begin in the middle of an epoch and numbers its samples.

    It gives pairs (number of the sample in the whole run, index into the dataset). The number
    seeds the sample's random crop, so that it is the same whichever worker or rank makes it.
    """

    skip = 0  # samples of the run, over all ranks, that the run it continues used up
    batch_size = 1  # over all ranks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(self.total_size, generator=generator) % len(self.dataset)
        per_epoch = self.total_size // self.batch_size * self.batch_size  # in whole batches
        first = self.epoch * per_epoch
        start = min(max(self.skip - first, 0), per_epoch)
        for position in range(start + self.rank, self.total_size, self.num_replicas):
            yield first + position, int(order[position])


class _Checked(torch.utils.data.Dataset):
    """A dataset that names an image which it cannot read; with a seed it takes numbered samples."""

    def __init__(self, dataset: Any, seed: int | None = None) -> None:
        self.dataset, self.opt, self.seed = dataset, dataset.opt, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        if self.seed is not None:
            number, index = index
            seed_everything(f"{self.seed}:{number}")
        try:
            return self.dataset[index]
        except Exception as error:
            name = getattr(self.dataset, "paths", {index: index})[index]
            name = name.get("gt_path", name) if isinstance(name, dict) else name
            reason = " ".join(map(str, error.args)) or type(error).__name__
            raise UserError(
                f"image {name} of {self.opt.get('dataroot_gt')} cannot be used: {reason}; restore "
                "or prepare the dataset again"
            ) from None


def seed_everything(text: str) -> None:
    """Seed the random numbers of Python, NumPy and PyTorch by a text."""
    random.seed(text)
    np.random.seed(random.getrandbits(32))
    torch.manual_seed(random.getrandbits(63))


def build_dataloader(dataset: Any, dataset_opt: dict[str, Any], **kwargs: Any) -> Any:
    """BasicSR's `build_dataloader`; in training with seeded samples and workers that stay.

    BasicSR's workers have the same seeds in every epoch: short epochs repeat the same crops.
    """
    if dataset_opt["phase"] != "train":
        return build_stock_dataloader(_Checked(dataset), dataset_opt, **kwargs)
    dataset_opt = {**dataset_opt, "persistent_workers": dataset_opt["num_worker_per_gpu"] > 0}
    loader = build_stock_dataloader(_Checked(dataset, kwargs["seed"]), dataset_opt, **kwargs)
    if not len(loader):
        raise UserError("the training images are less than one batch; raise dataset_enlarge_ratio")
    loader.worker_init_fn = _start_worker
    kwargs["sampler"].batch_size = loader.batch_size * kwargs["sampler"].num_replicas
    return loader


def _start_worker(worker_id: int) -> None:
    # Ctrl-C and batch systems signal every process of a job. The main process answers: it still
    # needs data to finish its step, and ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
