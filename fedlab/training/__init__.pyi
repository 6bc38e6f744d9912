from .metrics import evaluate, predict, summary, threshold_dice
from .networks import load_model, save_model, segresnet
from .schedules import CosineDecay, PolyDecay
from .trainer import DiceBCE, SiteTrainer, augmentation

__all__ = [
    "CosineDecay", "DiceBCE", "PolyDecay", "SiteTrainer", "augmentation", "evaluate", "load_model", "predict",
    "save_model", "segresnet", "summary", "threshold_dice",
]
