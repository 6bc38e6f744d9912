from .cards.card import DataCard, card_template, fill_card, read_card
from .phantom.generator import make_cohort, write_brats
from .readers.folders import read_cohort, read_patient, read_sites
from .readers.inspection import inspect_folder
from .readers.patient_folder import PatientFolder
from .sites.fingerprint import find_duplicates, fingerprint, fingerprint_site, same_person
from .sites.harmonisation import Harmonisation, fit_harmonisation
from .sites.heterogeneity import Heterogeneity, heterogeneity
from .sites.partition import (
    Partition,
    by_column,
    by_dirichlet_size,
    by_dirichlet_type,
    by_institution,
    by_quantity,
    by_scanner,
    tumour_types,
)
from .sites.statistics import Domain, SiteStatistics, site_statistics

__all__ = [
    "DataCard", "Domain", "Harmonisation", "Heterogeneity", "Partition", "PatientFolder", "SiteStatistics",
    "by_column", "by_dirichlet_size", "by_dirichlet_type", "by_institution", "by_quantity", "by_scanner",
    "card_template", "fill_card", "find_duplicates", "fingerprint", "fingerprint_site", "fit_harmonisation",
    "heterogeneity", "inspect_folder", "make_cohort", "read_card", "read_cohort", "read_patient", "read_sites",
    "same_person", "site_statistics", "tumour_types", "write_brats",
]
