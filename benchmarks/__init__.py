"""whitepool and its peers, side by side. `make bench` runs it all; `python -m benchmarks --help`."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "examples"))  # the embedded server is one of them
