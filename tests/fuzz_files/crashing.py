"""A child that dies at its third seed, to see that its parent notices."""

from __future__ import annotations

import json
import os
import sys

first, last = int(sys.argv[1]), int(sys.argv[2])
for seed in range(first, last):
    print(json.dumps({"begun": seed}), flush=True)
    if seed == 2:
        os.abort()
    print(json.dumps({"seed": seed, "how": "", "verdict": "opened", "why": ""}), flush=True)
