"""python generate.py --prompt "..." [--image photo.png | --video clip.mp4] [--output out.mp4]; --help lists all options."""

import sys

from lumos.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
