"""Make a clip: `python generate.py --prompt "..." [--image photo.png | --video clip.mp4] [--output out.mp4]`.

`python generate.py --help` lists all options.
"""

import sys

if __name__ == "__main__":
    try:
        from lumos.cli import program
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    sys.exit(program(["generate", *sys.argv[1:]]))
