"""Configuration files as people have them: kohya's and musubi-tuner's TOML, ai-toolkit's YAML."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux2_lora.dataset.imports import Imported, read_import

KOHYA = """
[general]
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 1
enable_bucket = true
bucket_reso_steps = 64
max_bucket_reso = 1536

[[datasets]]
resolution = [1024, 576]
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "/style"
  num_repeats = 10
  class_tokens = "a drawing"
  keep_tokens = 3
  flip_aug = true
  color_aug = true

  [[datasets.subsets]]
  image_dir = "/class"
  is_reg = true

[[datasets]]
resolution = 512

  [[datasets.subsets]]
  image_dir = "/style"
  shuffle_caption = false
  random_crop = true
  alpha_mask = true
  caption_dropout_rate = 0.05
"""

MUSUBI = """
[general]
resolution = [960, 544]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true
bucket_no_upscale = false

[[datasets]]
image_directory = "/one"
cache_directory = "/cache/one"
num_repeats = 2

[[datasets]]
image_directory = "/two"
resolution = 1024
"""

AI_TOOLKIT = """
job: extension
config:
  name: my_style
  process:
    - type: sd_trainer
      training_folder: output
      trigger_word: p3r5on
      network: {type: lora, linear: 16}
      datasets:
        - folder_path: /style
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [512, 768, 1024]
          num_repeats: 3
          keep_tokens: 1
          flip_x: true
          mask_path: /masks
          loss_multiplier: 0.5
        - folder_path: /class
          is_reg: true
          trigger_word: other
          default_caption: a drawing
          num_frames: 1
          do_i2v: true
          mask_min_value: 0.1
          network_weight: 1
          controls: []
          flip_y: false
      train: {batch_size: 4, steps: 2000}
    - type: other
      datasets:
        - dataset_path: /third
          shuffle_tokens: true
          random_crop: true
          alpha_mask: true
"""

Read = Callable[..., Imported]


def reader(folder: Path) -> Read:
    """What writes a text to a file in `folder` and imports it."""

    def write_and_read(text: str | bytes, name: str = "kohya.toml") -> Imported:
        file = folder / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_import(str(file))

    return write_and_read


def subset(options: str) -> str:
    return f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '/style'\n{options}\n"


def dataset(**options: Any) -> str:
    return json.dumps({"config": {"process": [{"datasets": [{"folder_path": "/style", **options}]}]}})
