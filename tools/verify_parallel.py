"""Prove that a config trains the same on every layout: losses, gradients, weights, checkpoints."""

import sys

from internlm_mm.verify.cli import main

if __name__ == '__main__':
    sys.exit(main())
