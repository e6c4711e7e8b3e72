"""Check what `make demo` left behind against the promises of the README: python .ci/check_demo.py RUN_FOLDER"""

import json
import sys
from pathlib import Path

ERROR_AT_MOST = 6.5  # percent, one update from held-out initialisations
ALIGNMENT_AT_LEAST = 0.95  # R² over G.pt's prompt range, held-out initialisations


def main(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    update = next(row for row in results["table"] if row["kind"] == "generator" and row["updates"] == 1)
    error = update["metrics"]["test_error"]["mean"]
    curve = next(c for c in results["curves"] if c["name"].startswith("held-out starts"))
    alignment = curve["alignment"]["mean"]
    page = (folder / "report.html").stat().st_size
    print(f"one update: {error:.2f} % error (at most {ERROR_AT_MOST}), alignment of {curve['name']!r}: {alignment:.3f}")
    if error > ERROR_AT_MOST or alignment < ALIGNMENT_AT_LEAST or page < 10_000:
        sys.exit("the demo misses its thresholds")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
