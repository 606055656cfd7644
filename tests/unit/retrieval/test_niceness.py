"""Work that can wait stands back from the process it belongs to, whatever place that process has itself."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="priorities belong to threads on Linux alone")

BOTH = """
import os, sys, threading
from concurrent.futures import ThreadPoolExecutor
from services.retrieval.niceness import give_way, give_way_whole
def mine():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
os.setpriority(os.PRIO_PROCESS, 0, int(sys.argv[1]))
with ThreadPoolExecutor(1, initializer=give_way) as waiting, ThreadPoolExecutor(1) as asking:
    print(mine(), asking.submit(mine).result(), waiting.submit(mine).result())
give_way_whole()
print(mine())
"""


@pytest.mark.parametrize(("own", "lower"), [(0, 10), (7, 17), (15, 19)])
def test_waiting_work_is_lower_than_its_process(own: int, lower: int) -> None:
    """Under a launcher that lowers the whole service, its documents must still come after its questions."""
    already = os.getpriority(os.PRIO_PROCESS, 0)
    if already > own:
        pytest.skip("this process stands back too far itself")
    done = subprocess.run([sys.executable, "-c", BOTH, str(own)], capture_output=True, text=True, check=True)

    assert done.stdout.split() == [str(own), str(own), str(lower), str(lower)]
