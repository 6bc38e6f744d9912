from .errors import DataError, FedlabError, PrivacyBudgetExhausted, PrivacyError, RunError, SiteError
from .regions import labels_to_regions, regions_to_labels
from .types import MODALITIES, REGIONS, Patient, Round, ServerState, Site, Spent, Update
from .weights import load_weights, weights_sha256

__all__ = [
    "MODALITIES", "REGIONS", "DataError", "FedlabError", "Patient", "PrivacyBudgetExhausted", "PrivacyError", "Round",
    "RunError", "ServerState", "Site", "SiteError", "Spent", "Update", "labels_to_regions", "load_weights",
    "regions_to_labels", "weights_sha256",
]
