"""Train a model: `python train.py --config configs/lumos1/tiny.yaml`, or `deepspeed --num_gpus 2 train.py --config ...`."""

import sys

if __name__ == "__main__":
    try:
        from lumos.cli import main
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    sys.exit(main(["train", *sys.argv[1:]]))
