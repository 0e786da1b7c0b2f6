"""On a CPU, memory that a step has freed is there for the next one.

The C library gives large blocks back to the system at once, and gets them again a moment later, page by page: each page
of 4 KiB is then cleared by the kernel when it is first written to, thousands of times a step. Told to keep what it has,
it does not.

The price: the process stays as large as its largest step. Only glibc can be told; elsewhere nothing happens.
"""

import ctypes

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of mallopt(3)
KEEP, DEFAULT = (0, 2**31 - 1), (65536, 128 * 1024)


def keep_freed_memory(on: bool = True) -> bool:
    """Keep what is freed from now on, in this process, or give it back again. Whether the C library could be told."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return False
    most, threshold = KEEP if on else DEFAULT
    return bool(mallopt(MMAP_MAX, most)) and bool(mallopt(TRIM_THRESHOLD, threshold))
