"""fedlab: privacy-preserving federated learning on 3-D brain-tumour MRI, in a notebook."""

from importlib import metadata as _metadata


def _refuse_namesake() -> None:
    """The package index's `fedlab` is another project that installs modules under the same name.

    Beside it, which of the two a module comes from depends on the order they were installed in.

    Raises:
        ImportError: that project is installed in this environment.
    """
    try:
        other = _metadata.distribution("fedlab")
    except _metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"another project's package is installed under the name fedlab (distribution 'fedlab' {other.version}, "
        f"in {other.locate_file('')}); fedlab-workbench cannot run beside it. Remove it, then put back what it may "
        "have overwritten:\n"
        "    python -m pip uninstall fedlab\n"
        "    python -m pip install --force-reinstall --no-deps -e .    (in the checkout of fedlab-workbench)",
        name="fedlab",
    )


_refuse_namesake()

__version__ = "0.1.0"

from fedlab.checks.engine import check_engine
from fedlab.checks.privacy import check_privacy
from fedlab.checks.strategy import check_strategy
from fedlab.core.errors import DataError, FedlabError, PrivacyBudgetExhausted, PrivacyError, RunError, SiteError
from fedlab.core.regions import labels_to_regions, regions_to_labels
from fedlab.core.types import MODALITIES, REGIONS, Patient, Round, ServerState, Site, Spent, Update
from fedlab.core.weights import load_weights, weights_sha256
from fedlab.data.cards.card import DataCard, card_template, fill_card, read_card
from fedlab.data.phantom.cohort import make_cohort, write_brats
from fedlab.data.readers.brats import read_cohort, read_patient, read_sites
from fedlab.data.readers.inspection import inspect_folder
from fedlab.data.readers.patient_folder import PatientFolder
from fedlab.data.sites.fingerprint import find_duplicates, fingerprint, fingerprint_site, same_person
from fedlab.data.sites.harmonisation import Harmonisation, fit_harmonisation
from fedlab.data.sites.heterogeneity import Heterogeneity, heterogeneity
from fedlab.data.sites.partition import (
    Partition,
    by_column,
    by_dirichlet_size,
    by_dirichlet_type,
    by_institution,
    by_quantity,
    by_scanner,
    tumour_types,
)
from fedlab.data.sites.statistics import Domain, SiteStatistics, site_statistics
from fedlab.deploy.host import SiteHost
from fedlab.deploy.plan import Plan, built
from fedlab.deploy.policy import Budget, Required, SitePolicy
from fedlab.engines.nvflare.environments import Production, ProofOfConcept, Simulation
from fedlab.engines.nvflare.nvflare import NVFlare
from fedlab.engines.processes import Processes
from fedlab.evidence.contributions import Contributions, KeepUpdates, dice_on, site_contributions
from fedlab.evidence.inversion import Inversion, invert_update, one_step_update, patch_net
from fedlab.faults.sites import (
    Corrupt,
    Crash,
    DropOut,
    Faulty,
    Joins,
    Leaves,
    PoisonedLabels,
    Replay,
    Scale,
    SignFlip,
    Straggler,
)
from fedlab.privacy.accounting.ledger import Ledger, Terms, noise_multiplier_for
from fedlab.privacy.accounting.ledger_file import LedgerFile
from fedlab.privacy.accounting.mechanisms import Concentrated, Gaussian, Pure, epsilon_of
from fedlab.privacy.at_sites import AtSites
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import Quantise, ScaledSign, SharePercentile, TopK
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.site_level import AdaptiveClip, CentralGaussian, LocalGaussian, clip_update
from fedlab.privacy.dp.validators import check_private, fix_private
from fedlab.privacy.personal_layers import PersonalLayers, norms, norms_and_head
from fedlab.privacy.secure_aggregation.aggregation import SecureAggregation
from fedlab.privacy.sparse.partial_sharing import SVT, PartialSharing, SparseVector, composed_epsilon
from fedlab.run.admission import Admission
from fedlab.run.baselines import centralised, local_only, pooled
from fedlab.run.federate import each_round, federate
from fedlab.run.history import History
from fedlab.run.local import Engine, Local
from fedlab.run.trace import Verdict, verify
from fedlab.run.trackers import CsvTracker, MLflowTracker, TensorBoardTracker
from fedlab.strategies import (
    SCAFFOLD,
    CoordinateMedian,
    Ditto,
    FedAvg,
    FedNova,
    FedOpt,
    FedProx,
    GeometricMedian,
    Krum,
    NormBound,
    Strategy,
    TooFewUpdates,
    TrimmedMean,
)
from fedlab.topologies.workflows import Buffered, Gossip, Tree, ring, star
from fedlab.training.metrics import evaluate, predict, summary, threshold_dice
from fedlab.training.networks import load_model, save_model, segresnet
from fedlab.training.trainer import DiceBCE, PolyDecay, SiteTrainer, augmentation
from fedlab.view.background_run import BackgroundRun, SiteDice
from fedlab.view.contribution_figure import contributions_figure
from fedlab.view.dashboard import RunDashboard
from fedlab.view.meshes import Surface, export_labels, surface
from fedlab.view.model_card import ModelCard, make_model_card
from fedlab.view.playground import PrivacyPlayground
from fedlab.view.run_figures import cross_site_heatmap, curves, dice_by_arm, sites_figure
from fedlab.view.site_figures import heterogeneity_figure, intensity_figure, partition_figure
from fedlab.view.slices import compare, show_patient
from fedlab.view.viewer import Viewer, show
from fedlab.view.workflow_figure import workflow_figure

__all__ = [
    "DPSGD", "MODALITIES", "REGIONS", "SCAFFOLD", "SVT", "AdaptiveClip", "Admission", "AtSites", "BackgroundRun",
    "Budget", "Buffered", "CentralGaussian", "Concentrated", "Contributions", "CoordinateMedian", "Corrupt", "Crash",
    "CsvTracker", "DataCard", "DataError", "DiceBCE", "Ditto", "Domain", "DropOut", "Engine", "Faulty", "FedAvg",
    "FedNova", "FedOpt", "FedProx", "FedlabError", "Gaussian", "GeometricMedian", "Gossip", "Harmonisation",
    "Heterogeneity", "History", "Inversion", "Joins", "KeepUpdates", "Krum", "Leaves", "Ledger", "LedgerFile", "Local",
    "LocalGaussian", "MLflowTracker", "ModelCard", "NVFlare", "NormBound", "PartialSharing", "Partition", "Patient",
    "PatientFolder", "PersonalLayers", "Plan", "PoisonedLabels", "PolyDecay", "Privacy", "PrivacyBudgetExhausted",
    "PrivacyError", "PrivacyPlayground", "Processes", "Production", "ProofOfConcept", "Pure", "Quantise", "Replay",
    "Required", "Round", "RunDashboard", "RunError", "Scale", "ScaledSign", "SecureAggregation", "ServerState",
    "SharePercentile", "SignFlip", "Simulation", "Site", "SiteDice", "SiteError", "SiteHost", "SitePolicy",
    "SiteStatistics", "SiteTrainer", "SparseVector", "Spent", "Straggler", "Strategy", "Surface", "TensorBoardTracker",
    "Terms", "TooFewUpdates", "TopK", "Tree", "TrimmedMean", "Update", "Verdict", "Viewer", "__version__",
    "augmentation", "built", "by_column", "by_dirichlet_size", "by_dirichlet_type", "by_institution", "by_quantity",
    "by_scanner", "card_template", "centralised", "check_engine", "check_privacy", "check_private", "check_strategy",
    "clip_update", "compare", "composed_epsilon", "contributions_figure", "cross_site_heatmap", "curves", "dice_by_arm",
    "dice_on", "each_round", "epsilon_of", "evaluate", "export_labels", "federate", "fill_card", "find_duplicates",
    "fingerprint", "fingerprint_site", "fit_harmonisation", "fix_private", "heterogeneity", "heterogeneity_figure",
    "inspect_folder", "intensity_figure", "invert_update", "labels_to_regions", "load_model", "load_weights",
    "local_only", "make_cohort", "make_model_card", "noise_multiplier_for", "norms", "norms_and_head",
    "one_step_update", "partition_figure", "patch_net", "pooled", "predict", "read_card", "read_cohort", "read_patient",
    "read_sites", "regions_to_labels", "ring", "same_person", "save_model", "segresnet", "show", "show_patient",
    "site_contributions", "site_statistics", "sites_figure", "star", "summary", "surface", "threshold_dice",
    "tumour_types", "verify", "weights_sha256", "workflow_figure", "write_brats",
]
