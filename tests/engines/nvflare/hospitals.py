"""A server and three hospitals of this machine, as fedlab's own commands make and start them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import sys
from pathlib import Path

import psutil
import torch

from fedlab import DPSGD, FedAvg, Privacy, SecureAggregation, Site, SiteTrainer
from fedlab.data import write_brats
from fedlab.deploy.plan import built
from fedlab.deploy.settings import read_settings, read_site
from fedlab.engines import NVFlare, Production
from fedlab.engines.nvflare.kits import free_port, running
from fedlab.evidence.inversion import patch_net
from fedlab.privacy import AtSites
from runs import command

NAMES = ("site-01", "site-02", "site-03")
DP = DPSGD(clip=1.0, noise_multiplier=1.2, delta=0.05, batch=2)
SECURE = SecureAggregation(clip=5.0, threshold=2)
PRIVATE: Privacy = AtSites(sites=("site-01",), technique=DP)
#: What sites and server inherit from this process.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def trainer(*, steps: int = 2, seed: int = 1) -> SiteTrainer:
    return SiteTrainer(model=built(patch_net, width=4, seed=seed), lr=0.05, steps=steps, crop=(16, 16, 16),
                       precision="fp32", optimiser=torch.optim.SGD)


class Hospitals:
    """The project's folder, its kits and the sites' own folders; starts, kills and ends their processes.

    `site-01` insists on DP-SGD with at least its noise.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.project, self.port = folder, folder / "project", free_port()
        self.kits = self.project / "kits"
        command("deploy", "init", self.project, "--server", "localhost", "--sites", *NAMES, "stranger", "--port",
                self.port)
        for number, name in enumerate(NAMES):
            write_brats(folder / "scans" / name, sites=1, patients=4 + number, shape=(32, 32, 32), spacing_mm=6.0,
                        seed=10 + number, cache=folder / "cache", workers=0, progress=False)
            command("site", "init", name, "--data", folder / "scans" / name, "--spacing", 6, "--shape", "32,32,32",
                    "--out", folder / name)
        settings = folder / "site-01" / "site.toml"
        settings.write_text(settings.read_text(encoding="utf-8").replace(
            "[policy]\n", '[policy]\nrequire = [{technique = "DPSGD", min_noise_multiplier = 1.0}]\n'),
            encoding="utf-8")

    def start(self, name: str) -> None:
        place = [] if name == "server" else ["--site", str(self.folder / name)]
        command("deploy", "start", self.kits / name, *place)

    def processes(self) -> list[psutil.Process]:
        return [process for kit in self.kits.iterdir() for process in running(kit)]

    def kill(self, name: str) -> None:
        """As a machine that loses power: all at once, without a word."""
        for process in running(self.kits / name):
            with contextlib.suppress(ProcessLookupError):  # a job ends with its party
                os.kill(process.pid, signal.SIGKILL)
        psutil.wait_procs(running(self.kits / name), timeout=10)

    def end(self) -> None:
        for kit in self.kits.iterdir():
            if kit.name != "admin":
                command("deploy", "stop", kit)

    def sites(self) -> list[Site]:
        """The hospitals' patients as they read them."""
        return [read_site(read_settings(self.folder / name), cache=self.folder / name / "prepared", progress=False)
                for name in NAMES]

    def engine(self, *, patience: float = 20.0) -> NVFlare:
        return NVFlare(env=Production(kit=self.kits / "admin", threads=1, repeatable_noise=True), patience=patience)


UNIFORM = FedAvg(weights="uniform")

#: Put before a site's job: its updates are spoiled in some rounds, as a site that was broken into might.
_SPOILED = '''\
import sys

if any("worker_process" in part for part in sys.orig_argv):
    import fedlab.deploy.host as host
    import torch
    from dataclasses import replace
    from fedlab.deploy.messages import pack_answer, unpack_answer, unpack_state

    honest = host.SiteHost.train

    def train(self, run, state):
        packed, number = honest(self, run, state), unpack_state(state).round
        update = unpack_answer(packed, site=self.site.name)
        if number == 1:
            return packed[:100] + b"x" + packed[101:]
        if number == 2:
            return packed + bytes(64 * 2**20)
        if number == 3:
            other = {name: torch.zeros(*t.shape, 2) for name, t in update.delta.items()}
            return pack_answer(replace(update, delta=other))
        if number == 4:
            return pack_answer(replace(update, site="site-03"))
        if number == 5:
            return pack_answer(replace(update, round=0))
        return packed

    host.SiteHost.train = train
'''


def spoil(folder: Path) -> dict[str, str]:
    """Variables with which a site's process spoils its updates in rounds 1 to 5."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SPOILED, encoding="utf-8")
    return {**ENVIRONMENT, "PYTHONPATH": str(folder)}


def knock(port: int, kit: Path | None, *, plain: bool = False) -> str:
    """Connects to the server as a process of `kit` would; "open" if the server lets it in, else how it refused."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as bare:
        try:
            line: socket.socket = bare
            if plain:
                bare.sendall(b"hello " * 20)
            else:
                context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                if kit is not None:
                    context.load_cert_chain(kit / "startup" / "client.crt", kit / "startup" / "client.key")
                line = context.wrap_socket(bare, server_hostname="localhost")
            line.settimeout(5)
            return "open" if line.recv(1) else "closed"
        except TimeoutError:
            return "open"  # it waits for what we have to say
        except ssl.SSLError as error:
            return str(error.reason)
        except ConnectionError as error:
            return type(error).__name__


def forge(kit: Path, out: Path, authority: Path, *, expired: bool) -> Path:
    """A copy of a site's kit with another certificate: by the project's own root key but expired, or by another's."""
    import datetime as dt
    import json

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    shutil.copytree(kit, out)
    old = x509.load_pem_x509_certificate((kit / "startup" / "client.crt").read_bytes())
    own = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    root = json.loads((authority / "cert.json").read_text(encoding="utf-8"))
    signer = serialization.load_pem_private_key(root["root_pri_key"].encode(), password=None) if expired else own
    now = dt.datetime.now(dt.UTC)
    made = (x509.CertificateBuilder().subject_name(old.subject).issuer_name(old.issuer).public_key(own.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=30))
            .not_valid_after(now - dt.timedelta(days=1) if expired else now + dt.timedelta(days=30)))
    for extension in old.extensions:
        made = made.add_extension(extension.value, extension.critical)
    (out / "startup" / "client.crt").write_bytes(
        made.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))  # type: ignore[arg-type]
    (out / "startup" / "client.key").write_bytes(own.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()))
    return out


if sys.platform != "linux":
    raise RuntimeError("these tests look into the process table of Linux")
