"""Public data sets whose licence allows a download: licence and citation first, then MONAI's downloader, checksum."""

from __future__ import annotations

import logging
import shutil
import socket
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedlab.core.errors import DataError

__all__ = ["SETS", "PublicSet", "fetch"]


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """A data set that may be downloaded.

    Attributes:
        title: its name.
        task: how MONAI's `DecathlonDataset` calls it; address and checksum are MONAI's.
        folder: what the archive unpacks to.
        gigabytes: free disk space needed, archive and scans together.
        licence: under which it may be used.
        citation: what a paper cites.
    """

    title: str
    task: str
    folder: str
    gigabytes: float
    licence: str
    citation: str


#: What can be fetched, by name.
SETS: Mapping[str, PublicSet] = {
    "msd-brain": PublicSet(
        title="Medical Segmentation Decathlon, Task01_BrainTumour: 484 training and 266 test cases",
        task="Task01_BrainTumour", folder="Task01_BrainTumour", gigabytes=16,
        licence="CC BY-SA 4.0: name the authors, say what you changed, share what you derive under the same licence",
        citation="Antonelli M. et al.: The Medical Segmentation Decathlon. Nature Communications 13, 4128 (2022). "
                 "doi:10.1038/s41467-022-30695-9"),
}
_ASK = ("BraTS and FeTS releases ask for registration and agreement to their terms, so nothing is downloaded for you: "
        "get the archive from the challenge's own site, unpack it, and look at it with 'fedlab data inspect DIR'")
_TIMEOUT_S = 60.0


def fetch(name: str, out: Path, *, url: str | None = None, md5: str | None = None, progress: bool = True) -> Path:
    """Downloads a data set into a new folder, compares its checksum and unpacks it.

    What it is, its licence and how to cite it are printed before anything is downloaded.

    Args:
        name: one of `SETS`; MONAI's name of it does too.
        out: a folder that doesn't exist yet, or an empty one.
        url: another address of the same archive.
        md5: its checksum, if it is another archive than MONAI's.
        progress: show a bar.

    Returns:
        The folder with the scans.

    Raises:
        DataError: an unknown name, a folder in use, no network, too little space, or an archive that isn't the one
            expected. Nothing of it is left behind.
    """
    chosen = next((one for key, one in SETS.items() if name in (key, one.task)), None)
    if chosen is None:
        raise DataError(f"{name!r} isn't among the data sets that can be fetched: {', '.join(SETS)}. {_ASK}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty; nothing is overwritten, choose another folder")
    from monai.apps import DecathlonDataset  # seconds to import

    address = url or DecathlonDataset.resource[chosen.task]
    checksum = (md5 or DecathlonDataset.md5[chosen.task]).lower()
    print(f"{chosen.title}\nlicence: {chosen.licence}\ncite: {chosen.citation}\nfrom: {address}", flush=True)
    by_hand = (f"By hand: get {address} on a machine that has a network, compare its MD5 checksum with {checksum}, "
               f"unpack it with 'tar xf', and look at it with 'fedlab data inspect {chosen.folder}'")
    if url is None:
        _check_space(out, chosen.gigabytes)
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".fetch-") as scratch:
        unpacked = _download(address, checksum, Path(scratch), by_hand, progress)
        out.mkdir(exist_ok=True)
        for entry in sorted(unpacked.iterdir()):
            shutil.move(str(entry), str(out / entry.name))
    found = out / chosen.folder
    return found if found.is_dir() else out


def _check_space(out: Path, gigabytes: float) -> None:
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free / 1e9
    if free < gigabytes:
        raise DataError(f"{place} has {free:.1f} GB free; archive and scans together take {gigabytes:g} GB")


def _download(address: str, checksum: str, scratch: Path, by_hand: str, progress: bool) -> Path:
    """The unpacked archive below `scratch`."""
    from monai.apps.utils import HashCheckError, download_url, extractall

    archive, unpacked = scratch / "archive.tar", scratch / "unpacked"
    with _downloading_in(scratch):
        try:
            download_url(address, archive, hash_val=checksum, hash_type="md5",
                         progress=progress and sys.stderr.isatty())
        except HashCheckError as error:
            raise DataError(f"what came from {address} isn't the archive expected: its MD5 checksum is not {checksum}. "
                            f"Try again, or ask who keeps that address. Nothing was unpacked") from error
        except (OSError, ValueError, RuntimeError) as error:  # urllib's errors are OSErrors
            reason = getattr(error, "reason", error)
            raise DataError(f"nothing could be downloaded from {address} ({reason}): there is no network, or the "
                            f"address doesn't answer. {by_hand}") from error
        if not archive.is_file():
            raise DataError(f"{scratch.parent} could not be written to")
        try:
            extractall(archive, unpacked, file_type="tar", has_base=False)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:  # ValueError: a path that leads out
            raise DataError(f"the archive from {address} can't be unpacked ({error})") from error
    return unpacked


@contextmanager
def _downloading_in(folder: Path) -> Iterator[None]:
    """MONAI's downloader as it is wanted here: its temporary files on the disk that was asked for, since the system's
    may be too small; a server that says nothing counts as no network; and our messages in place of its log.
    """
    log = logging.getLogger("monai.apps")
    place, patience, level = tempfile.tempdir, socket.getdefaulttimeout(), log.level
    tempfile.tempdir = str(folder)
    socket.setdefaulttimeout(_TIMEOUT_S)
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        tempfile.tempdir = place
        socket.setdefaulttimeout(patience)
        log.setLevel(level)
