"""Compares attribution methods: `python eval.py --config FILE`; the same as `airrep evaluate`."""

import sys

from airrep.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
