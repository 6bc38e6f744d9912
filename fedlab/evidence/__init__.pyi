from .contributions import Contributions, KeepUpdates, dice_on, site_contributions
from .inversion import Inversion, invert_update, one_step_update, patch_net

__all__ = [
    "Contributions", "Inversion", "KeepUpdates", "dice_on", "invert_update", "one_step_update", "patch_net",
    "site_contributions",
]
