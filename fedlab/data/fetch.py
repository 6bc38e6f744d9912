"""Download of public data sets whose licence permits it: licence and citation, MONAI's downloader, checksum."""

from __future__ import annotations

import logging
import shutil
import socket
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fedlab.core.errors import DataError
from fedlab.core.files import packaged_toml

__all__ = ["SETS", "PublicSet", "fetch"]


class PublicSet(NamedTuple):
    """A data set that may be downloaded; see `public_sets.toml`."""

    title: str
    task: str
    folder: str
    gigabytes: float
    licence: str
    citation: str


#: The data sets that can be downloaded, by name.
SETS: Mapping[str, PublicSet] = {name: PublicSet(**one)
                                 for name, one in packaged_toml(__package__, "public_sets.toml").items()}
_REGISTRATION = ("BraTS and FeTS releases require registration and agreement to their terms and are not downloaded: "
                 "get the archive from the challenge's own site, unpack it, and check it with 'fedlab data inspect "
                 "DIR'")
_TIMEOUT_S = 60.0


def fetch(name: str, out: Path, *, url: str | None = None, md5: str | None = None, progress: bool = True) -> Path:
    """Downloads a data set into a new folder, verifies its checksum and unpacks it.

    Title, licence and citation are printed before the download.

    Args:
        name: one of `SETS`, or MONAI's name of it.
        out: a folder that does not exist yet, or an empty one.
        url: another URL of the same archive.
        md5: its checksum, if the archive differs from MONAI's.
        progress: whether to show a bar.

    Returns:
        The folder with the scans.

    Raises:
        DataError: an unknown name, a folder in use, no network, too little space, or an unexpected archive. No partial
            files remain.
    """
    chosen = next((one for key, one in SETS.items() if name in (key, one.task)), None)
    if chosen is None:
        raise DataError(f"{name!r} is not one of the data sets that can be fetched: {', '.join(SETS)}. {_REGISTRATION}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty; nothing is overwritten, choose another folder")
    from monai.apps import DecathlonDataset  # takes seconds to import

    address = url or DecathlonDataset.resource[chosen.task]
    checksum = (md5 or DecathlonDataset.md5[chosen.task]).lower()
    print(f"{chosen.title}\nlicence: {chosen.licence}\ncite: {chosen.citation}\nfrom: {address}", flush=True)
    by_hand = (f"By hand: get {address} on a machine with a network, compare its MD5 checksum with {checksum}, unpack "
               f"it with 'tar xf', and check it with 'fedlab data inspect {chosen.folder}'")
    if url is None:
        _check_space(out, chosen.gigabytes)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".fetch-") as scratch:
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
        raise DataError(f"{place} has {free:.1f} GB free; archive and scans together need {gigabytes:g} GB")


def _download(address: str, checksum: str, scratch: Path, by_hand: str, progress: bool) -> Path:
    """The unpacked archive below `scratch`."""
    from monai.apps.utils import HashCheckError, download_url, extractall

    archive, unpacked = scratch / "archive.tar", scratch / "unpacked"
    with _downloading_in(scratch):
        try:
            download_url(address, archive, hash_val=checksum, hash_type="md5",
                         progress=progress and sys.stderr.isatty())
        except HashCheckError as error:
            raise DataError(f"the file from {address} is not the expected archive: its MD5 checksum is not {checksum}. "
                            f"Try again, or contact the provider of this URL. Nothing was unpacked") from error
        except (OSError, ValueError, RuntimeError) as error:  # urllib's errors are OSErrors
            reason = getattr(error, "reason", error)
            raise DataError(f"nothing could be downloaded from {address} ({reason}): there is no network, or the "
                            f"server does not answer. {by_hand}") from error
        if not archive.is_file():
            raise DataError(f"{scratch.parent} could not be written to")
        try:
            extractall(archive, unpacked, file_type="tar", has_base=False)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:  # ValueError: a path outside
            raise DataError(f"the archive from {address} cannot be unpacked ({error})") from error
    return unpacked


@contextmanager
def _downloading_in(folder: Path) -> Iterator[None]:
    """Settings for MONAI's downloader: temporary files on the requested disk, since the system's may be too small; a
    timeout for a server that does not answer; and fedlab's messages in place of MONAI's log.
    """
    log = logging.getLogger("monai.apps")
    temporary, timeout, level = tempfile.tempdir, socket.getdefaulttimeout(), log.level
    tempfile.tempdir = str(folder)
    socket.setdefaulttimeout(_TIMEOUT_S)
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        tempfile.tempdir = temporary
        socket.setdefaulttimeout(timeout)
        log.setLevel(level)
