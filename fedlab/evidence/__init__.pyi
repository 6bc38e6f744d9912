from .contributions import Contributions, KeepUpdates, dice_on, site_contributions
from .differences import Difference, difference
from .inversion import Inversion, invert_update, one_step_update, patch_net

__all__ = [
    "Contributions", "Difference", "Inversion", "KeepUpdates", "dice_on", "difference", "invert_update",
    "one_step_update", "patch_net", "site_contributions",
]
