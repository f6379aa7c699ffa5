"""Multi-crop augmentation and the forward pass of crops of several resolutions."""

from swavkit.multicrop.crop_group import CropGroup
from swavkit.multicrop.forward import multi_crop_forward
from swavkit.multicrop.masks import crop_masks
from swavkit.multicrop.photometric import PhotometricDistortion
from swavkit.multicrop.transform import MultiCropTransform

__all__ = [
    "CropGroup",
    "MultiCropTransform",
    "PhotometricDistortion",
    "crop_masks",
    "multi_crop_forward",
]
