"""swavkit: SwAV self-supervised learning (Caron et al. 2020) as PyTorch parts.

:class:`SwAVLoss` is the complete loss; its parts also work alone.
"""

from swavkit._head_losses import SwAVDetails
from swavkit.checkpoints import load_sharded_state_dict, sharded_state_dict
from swavkit.code_prediction import CodePredictionLoss, code_prediction_loss
from swavkit.feature_queue import FeatureQueue
from swavkit.monitor.diagnosis import Diagnosis, check_sizes
from swavkit.monitor.monitor import ClusterMonitor
from swavkit.multicrop.crop_group import CropGroup
from swavkit.multicrop.forward import multi_crop_forward
from swavkit.multicrop.masks import crop_masks
from swavkit.multicrop.photometric import PhotometricDistortion
from swavkit.multicrop.transform import MultiCropTransform
from swavkit.pretrained import LoadReport, load_pretrained, pretrained_state_dict
from swavkit.prototypes import PrototypeLayer
from swavkit.sinkhorn import SinkhornKnopp, sinkhorn_knopp
from swavkit.sinkhorn.marginals import marginal_error, power_law_prior
from swavkit.swapped_prediction import SwappedPredictionLoss, swapped_prediction_loss
from swavkit.swav import SwAVLoss
from swavkit.swav_statistics import SwAVStatistics, cluster_statistics

__all__ = [
    "ClusterMonitor",
    "CodePredictionLoss",
    "CropGroup",
    "Diagnosis",
    "FeatureQueue",
    "LoadReport",
    "MultiCropTransform",
    "PhotometricDistortion",
    "PrototypeLayer",
    "SinkhornKnopp",
    "SwAVDetails",
    "SwAVLoss",
    "SwAVStatistics",
    "SwappedPredictionLoss",
    "check_sizes",
    "cluster_statistics",
    "code_prediction_loss",
    "crop_masks",
    "load_pretrained",
    "load_sharded_state_dict",
    "marginal_error",
    "multi_crop_forward",
    "power_law_prior",
    "pretrained_state_dict",
    "sharded_state_dict",
    "sinkhorn_knopp",
    "swapped_prediction_loss",
]

__version__ = "0.1.0"
