"""The benchmarks are scripts beside the package: they are imported from the checkout, wherever pytest was started."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
