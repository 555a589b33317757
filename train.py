"""Training with GRPO: `python train.py`, `deepspeed train.py --recipe visualthinker-2b-sat`. See --help."""

import sys

from vtfast.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
