#!/usr/bin/env python
"""Search for the best Batch-CAM configurations; `--help` lists the options.

python studies/bcpl_sweep.py --study NAME --dataset fashion_mnist --num-trials 32
ray job submit studies/bcpl_sweep.py
"""

import sys
from pathlib import Path

# Python puts the folder of a script first, so that the modules in it would shadow others. The
# checkout of the script replaces it, and is the one that runs, installed or not.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from studies.cli import run_study  # noqa: E402

if __name__ == "__main__":
    run_study()
