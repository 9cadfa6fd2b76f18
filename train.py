"""Trains the encoder: `accelerate launch train.py --config FILE`; the same as `airrep train`."""

import sys

from airrep.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
