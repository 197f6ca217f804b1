import sys

from lumos.cli import main

if __name__ == "__main__":
    sys.exit(main())
