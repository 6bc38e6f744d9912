from .background_run import BackgroundRun, SiteDice
from .colours import style
from .dashboard import RunDashboard
from .interval_figures import runs_figure, sweep_figure
from .meshes import Surface, export_labels, surface
from .model_card import ModelCard, make_model_card
from .playground import PrivacyPlayground
from .run_figures import contributions_figure, cross_site_heatmap, curves, dice_by_arm
from .site_figures import heterogeneity_figure, intensity_figure, partition_figure, sites_figure, workflow_figure
from .slices import compare, show_patient
from .viewer import Viewer, show

__all__ = [
    "BackgroundRun", "ModelCard", "PrivacyPlayground", "RunDashboard", "SiteDice", "Surface", "Viewer", "compare",
    "contributions_figure", "cross_site_heatmap", "curves", "dice_by_arm", "export_labels", "heterogeneity_figure",
    "intensity_figure", "make_model_card", "partition_figure", "runs_figure", "show", "show_patient",
    "sites_figure", "style", "surface", "sweep_figure", "workflow_figure",
]
