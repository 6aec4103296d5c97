#!/usr/bin/env python
"""Search for the best Batch-CAM configurations; `--help` lists what can be said.

python studies/bcpl_sweep.py --study NAME --dataset fashion_mnist --num-trials 32
ray job submit studies/bcpl_sweep.py
"""

import sys
from pathlib import Path

# Python put this script's folder first, from which its neighbours would shadow other modules; and
# the checkout that the script lies in is the one to run, installed or not.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from studies.study import main  # noqa: E402

if __name__ == "__main__":
    main()
