from .metrics import evaluate, predict, summary, threshold_dice
from .networks import load_model, save_model, segresnet
from .trainer import DiceBCE, PolyDecay, SiteTrainer, augmentation

__all__ = [
    "DiceBCE", "PolyDecay", "SiteTrainer", "augmentation", "evaluate", "load_model", "predict", "save_model",
    "segresnet", "summary", "threshold_dice",
]
