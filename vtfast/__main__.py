"""`python -m vtfast COMMAND`, and with several ranks `deepspeed --module vtfast COMMAND`."""

import sys

from vtfast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
