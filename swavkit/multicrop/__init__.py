"""Multi-crop: the crops of an image, and their pass through a network."""

from swavkit.multicrop.crop_group import CropGroup
from swavkit.multicrop.forward import multi_crop_forward
from swavkit.multicrop.photometric import PhotometricDistortion
from swavkit.multicrop.transform import MultiCropTransform

__all__ = ["CropGroup", "MultiCropTransform", "PhotometricDistortion", "multi_crop_forward"]
