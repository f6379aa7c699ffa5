"""Placeholder until the real room is written."""
CropGroup = MultiCropTransform = PhotometricDistortion = multi_crop_forward = None
