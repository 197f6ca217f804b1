"""Train a model: `python train.py --config configs/lumos1/tiny.yaml`, or `deepspeed --num_gpus 2 train.py --config ...`."""

import sys

if __name__ == "__main__":
    try:
        from lumos.cli import program
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    sys.exit(program(["train", *sys.argv[1:]]))
