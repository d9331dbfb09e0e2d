"""Run by test_configs.py and test_text_configs.py as each of two processes: several command lines after one another.

Usage: python cli_ddp_script.py FILE, a JSON list of the arguments of `cli.py`, one list each
"""

import json
import sys
from pathlib import Path

import torch
from cases import leave_together

from lightning_ire.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    commands = json.loads(Path(sys.argv[1]).read_text())
    sys.argv = ["cli.py"]
    for arguments in commands:
        print(*arguments, file=sys.stderr)
        if code := main(arguments):
            sys.exit(code)
    leave_together()
