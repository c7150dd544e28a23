"""Train a model from a config."""

import sys

from internlm_mm.engine.train_cli import main

if __name__ == '__main__':
    sys.exit(main())
