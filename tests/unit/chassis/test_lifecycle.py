"""What a process does with its memory once it is built."""

import subprocess
import sys

LONG_RUN = """
import gc
from services.chassis.lifecycle import GC_YOUNG_MAX, settle
kept = [[] for _ in range(1_000_000)]
settle()
before = gc.get_stats()[2]["collections"]
for _ in range(150):
    batch = [[] for _ in range(GC_YOUNG_MAX + 100)]
print(gc.get_freeze_count() >= 1_000_000, gc.get_stats()[2]["collections"] - before)
"""


def test_what_is_kept_for_good_does_not_put_full_collections_off() -> None:
    """They are the only ones that find cycles which outlived two young ones: an orchestrator grew by tens of megabytes before the first."""
    said = subprocess.run([sys.executable, "-c", LONG_RUN], capture_output=True, text=True, check=True).stdout.split()

    assert said[0] == "True"
    assert int(said[1]) >= 1
