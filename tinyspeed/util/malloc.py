"""On a CPU, memory that one step has freed is kept for the next one.

The C library gives large blocks back to the system at once and asks for them again a moment later. The kernel then
clears each page of 4 KiB when it is first written to, thousands of times a step. glibc can be told to keep the memory
instead; other C libraries cannot, and there nothing happens. The process then stays as large as its largest step.
"""

import ctypes

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of mallopt(3)
KEEP, DEFAULT = (0, 2**31 - 1), (65536, 128 * 1024)


def keep_freed_memory(on: bool = True) -> bool:
    """Makes this process keep the memory that it frees from now on, or give it back again. Returns whether it can."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return False
    most, threshold = KEEP if on else DEFAULT
    return bool(mallopt(MMAP_MAX, most)) and bool(mallopt(TRIM_THRESHOLD, threshold))
