from .errors import DataError, FedlabError, PrivacyBudgetExhausted, PrivacyError, RunError, SiteError
from .extras import need_lab
from .kit import Kit
from .protocols import Engine, Run, Strategy, Topology
from .regions import labels_to_regions, regions_to_labels
from .types import MODALITIES, REGIONS, Patient, Round, ServerState, Site, SiteState, Spent, Update, rounded_up
from .weights import load_weights, weights_sha256

__all__ = [
    "MODALITIES", "REGIONS", "DataError", "Engine", "FedlabError", "Kit", "Patient", "PrivacyBudgetExhausted",
    "PrivacyError", "Round", "Run", "RunError", "ServerState", "Site", "SiteError", "SiteState", "Spent", "Strategy",
    "Topology", "Update", "labels_to_regions", "load_weights", "need_lab", "regions_to_labels", "rounded_up",
    "weights_sha256",
]
