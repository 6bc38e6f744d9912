from .nvflare.environments import NVFlare, Production, ProofOfConcept, Simulation
from .processes import Processes

__all__ = [
    "NVFlare", "Processes", "Production", "ProofOfConcept", "Simulation",
]
