from .nvflare.environments import Production, ProofOfConcept, Simulation
from .nvflare.nvflare import NVFlare
from .processes import Processes

__all__ = [
    "NVFlare", "Processes", "Production", "ProofOfConcept", "Simulation",
]
