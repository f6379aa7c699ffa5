"""SwAV on a folder of images, or another data set, that Hugging Face datasets reads.

pip install datasets
python docs/examples/recipes/huggingface_folder.py FOLDER
"""

import sys

import torch
from datasets import load_dataset
from torch import nn
from torch.utils.data import DataLoader

from swavkit import CropGroup, MultiCropTransform, SwAVLoss, multi_crop_forward

EPOCHS, BATCH_SIZE = 1, 16

dataset = load_dataset("imagefolder", data_dir=sys.argv[1], split="train")
transform = MultiCropTransform((CropGroup(64, 2, (0.3, 1.0)), CropGroup(32, 4, (0.1, 0.3))))


def crops_of(rows):  # of PIL images of any sizes and modes, in the workers of the loader
    return {"crops": [transform(image) for image in rows["image"]]}


dataset = dataset.with_transform(crops_of)
network = nn.Sequential(
    *(nn.Conv2d(3, 32, 5, stride=4), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64)),
)
criterion = SwAVLoss(feature_dim=64, num_prototypes=30, epsilon=0.02)
optimizer = torch.optim.AdamW([*network.parameters(), *criterion.parameters()], lr=2e-3)
loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, drop_last=True, num_workers=2)
for epoch in range(EPOCHS):
    for batch in loader:
        features = multi_crop_forward(network, batch["crops"])
        loss = criterion(features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.2f}", flush=True)
