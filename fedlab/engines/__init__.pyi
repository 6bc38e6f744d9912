from .nvflare.environments import NVFlare, Production, ProofOfConcept, Simulation
from .nvflare.kits import need_nvflare
from .processes import Processes

__all__ = [
    "NVFlare", "Processes", "Production", "ProofOfConcept", "Simulation", "need_nvflare",
]
