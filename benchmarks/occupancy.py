"""How many blocks of a kernel a multiprocessor of an H100 or H200 (compute capability 9.0) holds at a time.

The least of four bounds, as CUDA's occupancy calculator takes them (CUDA C++ Programming Guide, technical
specifications per compute capability):

    registers   65,536 per multiprocessor, a quarter for each of its 4 schedulers, handed to a warp in units of 256
    warps       64 per multiprocessor
    shared      228 KiB per multiprocessor, in units of 128 bytes, 1 KiB of every block being the driver's
    blocks      32 per multiprocessor
"""

from __future__ import annotations

SCHEDULERS = 4
REGISTERS, REGISTER_UNIT = 65_536, 256
WARPS, BLOCKS = 64, 32
SHARED, SHARED_UNIT, SHARED_OF_DRIVER = 228 << 10, 128, 1 << 10


def blocks_per_sm(registers: int, warps: int, shared: int) -> int:
    """registers: per thread; warps and shared (bytes): of a block."""
    of_warp = rounded_up(32 * max(registers, 1), REGISTER_UNIT)
    warps_that_fit = SCHEDULERS * (REGISTERS // SCHEDULERS // of_warp)
    by_shared = SHARED // rounded_up(shared + SHARED_OF_DRIVER, SHARED_UNIT)
    return min(warps_that_fit // warps, WARPS // warps, by_shared, BLOCKS)


def rounded_up(amount: int, unit: int) -> int:
    return -(-amount // unit) * unit
