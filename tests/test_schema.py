"""The schema of option files: what editors read, the check, and the page say the same."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import pytest
from conftest import REPOSITORY

from mlrn_arch import checks, option_files, schema

FILES = sorted((REPOSITORY / "options").rglob("*.yml"))
EDITOR = jsonschema.Draft7Validator(schema.json_schema())

# In the form of BasicSR's own files: a model of one image that we know, and one that we do not.
PAIRED = """
name: 201_EDSR_Mx2
model_type: SRModel
scale: 2
num_gpu: 1
manual_seed: 10
datasets:
  train:
    name: DIV2K
    type: PairedImageDataset
    dataroot_gt: datasets/HR_sub
    dataroot_lq: datasets/LR_sub
    filename_tmpl: '{}'
    io_backend:
      type: disk
    gt_size: 96
    use_hflip: true
    use_rot: true
    num_worker_per_gpu: 6
    batch_size_per_gpu: 16
    dataset_enlarge_ratio: 100
    prefetch_mode: ~
network_g: {type: EDSR, num_in_ch: 3, num_out_ch: 3, upscale: 2, img_range: 255., rgb_mean: [0.4]}
path: {pretrain_network_g: ~, strict_load_g: true, resume_state: ~}
train:
  ema_decay: 0.999
  optim_g: {type: Adam, lr: !!float 1e-4, weight_decay: 0, betas: [0.9, 0.99]}
  scheduler: {type: MultiStepLR, milestones: [200000], gamma: 0.5}
  total_iter: 300000
  warmup_iter: -1
  pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}
val:
  val_freq: !!float 5e3
  save_img: false
  metrics: {psnr: {type: calculate_psnr, crop_border: 2, test_y_channel: false}}
logger:
  print_freq: 100
  save_checkpoint_freq: !!float 5e3
  use_tb_logger: true
  wandb: {project: ~, resume_id: ~}
dist_params: {backend: nccl, port: 29500}
"""
FOREIGN = """
name: train_RealESRGANx4plus
model_type: RealESRGANModel
scale: 4
num_gpu: auto
l1_gt_usm: true
resize_prob: [0.2, 0.7, 0.1]
queue_size: 180
datasets:
  train: {name: DF2K, type: RealESRGANDataset, dataroot_gt: datasets, meta_info: m, sinc_prob: 0.1}
network_g: {type: RRDBNet, num_in_ch: 3}
network_d: {type: UNetDiscriminatorSN, num_in_ch: 3}
path: {pretrain_network_g: a.pth, param_key_g: params_ema, pretrain_network_d: ~}
train:
  optim_g: {type: Adam, lr: 1e-4}
  optim_d: {type: Adam, lr: 1e-4}
  scheduler: {type: MultiStepLR, milestones: [400000]}
  total_iter: 400000
  precision: 16
  gan_opt: {type: GANLoss, loss_weight: 0.1}
logger: {print_freq: 100, save_checkpoint_freq: 5000}
"""


def complete(text: str, changes: dict | None = None) -> tuple[dict, list[str], list[str]]:
    opt = option_files.parse(text)
    for place, value in (changes or {}).items():
        *sections, key = place.split(":")
        section = opt
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    faults, unread, notes = schema.complete(opt, checks.bases, training=True)
    return opt, faults + unread, notes


def test_the_schema_is_json_schema():
    jsonschema.Draft7Validator.check_schema(schema.json_schema())
    for place, option in schema.declared().items():
        kinds = {"type", "enum", "anyOf", "then"} & option.keys()
        assert kinds, place
        wanted = not place or "*" in place[-1] or option.get("description")
        assert wanted, place


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_option_file_names_the_schema_and_fits_it(path):
    header = path.read_text(encoding="utf-8").splitlines()[0]
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", header)
    folder = path.resolve().parent  # two files are links
    assert named and (folder / named[1]).resolve() == REPOSITORY / "options/schema.json"
    assert not list(EDITOR.iter_errors(option_files.parse(path.read_text(encoding="utf-8"))))


def test_files_as_basicsr_has_them():
    for text in (PAIRED, FOREIGN):
        assert not list(EDITOR.iter_errors(option_files.parse(text)))
        opt, faults, notes = complete(text)
        assert not faults and not notes
    opt, _, _ = complete(PAIRED)
    assert opt["val"]["val_freq"] == 5000 and isinstance(opt["val"]["val_freq"], int)
    assert opt["train"]["optim_g"]["lr"] == 1e-4 and "precision" not in opt["train"]
    assert "resume_state" not in opt["path"]  # a key without a value is not there
    assert complete(FOREIGN)[0]["train"]["optim_g"]["lr"] == 1e-4


FAULTS = {  # what is changed in PAIRED -> what is said
    "train:precision": ("bf16", "train:precision: needs model_type: FastSRModel; set that, or"),
    "logger:keep_last": (3, "logger:keep_last: needs model_type: FastSRModel"),
    "network_t": ({"type": "RLFN"}, "network_t: needs model_type: DistillModel"),
    "train:lr": (0.1, "train:lr: nothing reads it; did you mean train:optim_g:lr?"),
    "save_best": ("psnr", "save_best: nothing reads it; did you mean val:save_best?"),
    "gt_size": (96, "gt_size: nothing reads it; did you mean datasets:NAME:gt_size?"),
    "train:total_iters": (9, "train:total_iters: nothing reads it; did you mean total_iter?"),
    "train:optim_g:lr": ("'1'", "train:optim_g:lr: must be a number above 0, not the text"),
    "train:optim_g:betas": ([0.9, 1], "must be two numbers from 0 to below 1, not [0.9, 1]"),
    "train:scheduler:milestones": ([None], "must be a list of whole numbers, 1 or more, not"),
    "train:grad_clip": (float("nan"), "train:grad_clip: needs model_type"),
    "train:ema_decay": (float("nan"), "train:ema_decay: must be a number from 0 to 1, not nan"),
    "train:total_iter": (True, "train:total_iter: must be a whole number, 1 or more, not True"),
    "val:metrics:psnr": (5, "val:metrics:psnr: must be a section of `key: value` lines, not 5"),
    "datasets:train:color": ("rgb", "datasets:train:color: must be y, not 'rgb'"),
    "model_type": (5, "model_type: must be text, not 5"),
    "logger": (None, "logger: is missing (log and checkpoints of a training)"),
    "val:val_freq": (None, "val:val_freq: is missing (iterations between validations)"),
    "num_gpu": ("all", "num_gpu: must be auto or a whole number, 0 or more, not 'all'"),
}


@pytest.mark.parametrize("place", FAULTS)
def test_a_fault_is_a_sentence(place):
    value, sentence = FAULTS[place]
    _, faults, _ = complete(PAIRED, {place: value})
    assert len(faults) == 1 and sentence in faults[0]


def test_faults_come_all_at_once():
    several = FAULTS.keys() - {"model_type", "logger"}
    changes = {place: FAULTS[place][0] for place in FAULTS if place in several}
    _, faults, _ = complete(PAIRED, {**changes, "datasets": {5: {}}})
    assert faults == ["datasets:5: a key must be text; put it in quotes"]
    _, faults, _ = complete(PAIRED, changes)
    assert len(faults) == len(changes)


def test_what_does_nothing_is_noted_or_refused():
    changes = {"val:flip_seq": True, "val:center_frame_only": True, "x_note": 1, "train:x_why": "y"}
    changes |= {
        "datasets:train:interval_list": [1],
        "path:param_key": "params",
        "val:nothing": None,
    }
    _, faults, notes = complete(PAIRED, changes)
    assert not faults
    assert sorted(note.split(":")[-2] for note in notes) == [
        "center_frame_only", "flip_seq", "interval_list", "param_key"
    ]  # fmt: skip
    # Nobody knows what a model of others reads.
    assert not complete(FOREIGN, {"train:flow_lr_mul": 0.1, "val": {"val_freq": 1, "frame": 2}})[1]
    assert "total_iter: must be" in complete(FOREIGN, {"train:total_iter": "x"})[1][0]
    assert not complete(PAIRED, {"datasets:train:type": "MyDataset", "datasets:train:new": 1})[1]


def test_defaults_are_filled_in_for_those_who_read_them():
    opt, faults, _ = complete(PAIRED, {"model_type": "FastSRModel", "train:channels_last": None})
    assert not faults
    train = {"precision": "fp32", "channels_last": True, "compile": False, "warmup_iter": -1}
    assert train.items() <= opt["train"].items() and opt["val"]["precision"] == "fp32"
    assert "distill_opt" not in opt["train"] and "grad_clip" not in opt["train"]
    assert schema.defaults("train", "distill_opt") == {"gt_weight": 0}


def test_the_page_lists_every_option_of_our_own():
    rows = [
        f"| `{':'.join(place)}` | "
        + (f"`{str(option['default']).lower()}` " if "default" in option else "")
        + f"| {option['description']} |"
        for place, option in schema.declared().items()
        if "model" in option and place != ("train", "distill_opt")
    ]
    page = Path(REPOSITORY / "options/README.md").read_text(encoding="utf-8").splitlines()
    missing = [row for row in rows if row not in page]
    assert not missing, "\n".join(missing)
