"""The heap of a server's threads."""

import subprocess
import sys

PROBE = """
import ctypes, sys, threading
from runtime.lanes import use_one_heap
if sys.argv[1] == "one":
    use_one_heap()
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
addresses = []
thread = threading.Thread(target=lambda: addresses.append(malloc(4096)))
thread.start()
thread.join()
for line in open("/proc/self/maps"):
    first, last = (int(part, 16) for part in line.split()[0].split("-"))
    if first <= addresses[0] < last:
        print("main" if line.rstrip().endswith("[heap]") else "own")
"""


def heap_of_a_thread(mode):
    return subprocess.run(
        [sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_threads_of_a_server_share_the_main_heap():
    assert heap_of_a_thread("one") == "main"
    assert heap_of_a_thread("each") == "own"
