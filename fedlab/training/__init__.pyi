from .defaults import DiceBCE, augmentation
from .metrics import evaluate, predict, summary, threshold_dice
from .networks import load_model, save_model, segresnet
from .public_model import public_card, public_file, public_model
from .schedules import CosineDecay, PolyDecay
from .trainer import SiteTrainer

__all__ = [
    "CosineDecay", "DiceBCE", "PolyDecay", "SiteTrainer", "augmentation", "evaluate", "load_model", "predict",
    "public_card", "public_file", "public_model", "save_model", "segresnet", "summary", "threshold_dice",
]
