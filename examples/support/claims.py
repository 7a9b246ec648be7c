"""Claims: a run's folder belongs to one process at a time, on one machine or several."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE = 5.0  # seconds; longer than a look at the claim, for which it is held for a moment


def claim(folder: Path) -> FileLock:
    """Claims a folder until the lock is released, or the process has ended in whatever way.

    The operating system holds the lock (flock), so that a killed process leaves no stale claim.
    Across machines the folder must be on a file system that passes such locks on: NFS since
    version 4, Lustre mounted with `flock`, GPFS and CephFS do.

    Raises:
        SystemExit: If another process holds the claim.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise SystemExit(f"Another process is training the run in {folder}.") from None
    return lock


def is_claimed(folder: Path) -> bool:
    """Whether a process is training the run in a folder."""
    if not folder.exists():
        return False
    try:
        with _lock(folder).acquire(timeout=0):
            return False
    except Timeout:
        return True


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / "claim.lock")
