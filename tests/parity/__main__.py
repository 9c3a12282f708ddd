"""Hold our pieces against golden cases.

    python -m tests.parity tests/parity/cases/stvit
    python -m tests.parity DIR [DIR ...] --trace

Every `<case>.json` below the folders is run; the folder that holds it names the paper. One line per case:

    PASS paper/case  worst relative error
    FAIL paper/case  [worst relative error]  reason
    NOT RUN paper/file  reason                      (inventories that no adapter knows; they count as neither)

The last line is `N passed, N failed`. The exit status is 0 when something passed and nothing failed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from .runner import FAIL, PASS, run_folders


def main(arguments: list[str] | None = None) -> int:
    """Run the cases below the folders in `arguments` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder with cases, at any depth")
    parser.add_argument("--trace", action="store_true", help="print the traceback of unexpected errors")
    options = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    try:
        for result in run_folders(options.folders):
            counts[result.status] += 1
            print(result.line(), flush=True)
            if options.trace and result.trace:
                print(result.trace, file=sys.stderr)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{counts[PASS]} passed, {counts[FAIL]} failed")
    return 0 if counts[PASS] and not counts[FAIL] else 1


if __name__ == "__main__":
    sys.exit(main())
