"""``python -m dppo`` whose last word only the second process is told: ``torchrun ... -m tests.apart WORDS``."""

from __future__ import annotations

import os
import sys

from dppo.__main__ import main

if __name__ == "__main__":
    if os.environ["RANK"] != "1":
        sys.argv.pop()
    sys.exit(main())
