"""Handing in a saved run from the command line, and following it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file

from fedlab.engines.nvflare.admin import Admin
from fedlab.engines.nvflare.environments import Production
from fedlab.engines.nvflare.run_folder import Diary, read_round
from fedlab.engines.nvflare.saved_run import SavedRun

__all__ = ["follow", "hand_in"]


def hand_in(folder: Path, kit: Path) -> str:
    """Hands in the job of a saved run and returns the job's name.

    Raises:
        RunError: the folder holds no run, or the server doesn't take it.
    """
    saved = SavedRun.read(folder)
    with Admin(kit, patience=20.0) as admin, tempfile.TemporaryDirectory() as scratch:
        return admin.submit(saved.write_job(Path(scratch) / "job", 0))


def follow(folder: Path, kit: Path, *, wait: float) -> Iterator[str]:
    """Hands in a saved run, or goes on with it, and writes its rounds and final weights into its folder.

    Args:
        folder: of the run.
        kit: the researcher's.
        wait: seconds until enough sites must be connected.

    Yields:
        A line about each round.

    Raises:
        RunError, PrivacyError: as `NVFlare.rounds`.
    """
    saved, diary = SavedRun.read(folder), Diary(folder)
    env = Production(kit=kit, wait=wait)
    for finished in env.rounds(saved.plan, [], saved.write_job, have=len(diary)):
        diary.add(finished)
        absent = "; ".join(f"{site} is not in it: {why}" for site, why in finished.absent.items())
        yield (f"round {finished.number + 1} of {saved.plan.rounds}: {len(finished.sites)} sites, "
               f"{finished.seconds:.1f} s{'; ' if absent else ''}{absent}")
    last = len(diary) - 1
    if last >= 0:
        params = read_round(diary.text(last), diary.weights(last)).state.params
        save_file({name: tensor.contiguous() for name, tensor in params.items()}, folder / "weights.safetensors")
        yield f"weights after round {last + 1}: {folder / 'weights.safetensors'}"
