"""Train: `python tools/train.py CONFIG [--launcher slurm] [--cfg-options a.b=c ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from internlm_mm.engine.train_cli import main

if __name__ == '__main__':
    sys.exit(main())
