"""Write recorded.json anew: `python tests/golden/parity/record.py [CASE …]`, for a change that is to move numbers."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / place) for place in ("tests/golden/parity", "src", "tests/support", "tests/support/warm")]
import adapters  # noqa: E402
import cases  # noqa: E402
import torch  # noqa: E402

FILE = Path(__file__).with_name("recorded.json")


def main() -> None:
    """Make every case (or those named) and store it."""
    torch.set_num_threads(1)
    adapters.leave_process_group()
    old = json.loads(FILE.read_text()) if FILE.is_file() else {}
    found = {"environment": cases.environment(), **{key: old.get(key, {}) for key in ("pairs", "rows", "losses")}}
    makers = {
        "pairs": {case: lambda folder, case=case: cases.pair_digests(case, folder) for case in cases.PAIRS},
        "rows": {case: lambda folder, case=case: cases.row_digests(case, folder) for case in cases.ROWS},
        "losses": cases.LOSSES}
    for group, own in makers.items():
        for case, make in own.items():
            if sys.argv[1:] and case not in sys.argv[1:]:
                continue
            with tempfile.TemporaryDirectory() as folder:
                start = time.monotonic(), time.process_time()
                found[group][case] = make(Path(folder))
                spent = time.monotonic() - start[0], time.process_time() - start[1]
                print(f"{group}: {case}: {spent[0]:.1f} s, {spent[1]:.1f} s of a core", file=sys.stderr)
    FILE.write_text(lines(found) + "\n")


def lines(value: Any, indent: str = "") -> str:
    """JSON with one line for each list of numbers or digests."""
    if not isinstance(value, dict):
        return json.dumps(value)
    more = indent + " "
    own = ",\n".join(f"{more}{json.dumps(key)}: {lines(one, more)}" for key, one in value.items())
    return "{\n" + own + f"\n{indent}}}"


if __name__ == "__main__":
    main()
