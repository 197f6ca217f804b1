"""Train: `python train.py --config configs/training/tiny.yaml`, or `deepspeed --num_gpus 2 train.py --config ...`."""

from __future__ import annotations

import sys

from lumos.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
