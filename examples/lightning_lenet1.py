"""LeNet-1 trained by PyTorch Lightning: Adam 1e-3, ReduceLROnPlateau, 1/12 of the training set held out.

    pip install lenet-fast lightning
    python examples/lightning_lenet1.py                        # MNIST: 55,000 images to train on, 5,000 held out
    python examples/lightning_lenet1.py --dataset mnist-10k    # the digits inside the package: no download, quick

The model's fused layers are ordinary modules with ordinary parameters, so nothing here is special to them.
"""

import warnings
from pathlib import Path
from typing import Annotated

import lightning as L
import torch
import torch.nn.functional as F
import typer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, random_split

from lenet_fast import data
from lenet_fast.models import lenet1

BATCH_SIZE = 256


class LeNet1(L.LightningModule):
    """LeNet-1 on batches of uint8 images (N, 28, 28) and labels (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.model = lenet1()

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self._loss("train", batch)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self._loss("val", batch)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self._loss("test", batch)

    def _loss(self, stage: str, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        logits = self.model(self.model.input_spec.prepare(images))
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        scores = {f"{stage}_loss": loss, f"{stage}_accuracy": accuracy}
        self.log_dict(scores, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss


def train(digits: data.Dataset, *, epochs: int, seed: int, output: Path) -> L.Trainer:
    """Train, then test the epoch of the best validation accuracy; the trainer's `logged_metrics` tell the outcome."""
    L.seed_everything(seed)
    images = TensorDataset(digits.train.images, digits.train.labels)
    held_out = len(images) // 12  # of 60,000: 5,000
    train_set, val_set = random_split(images, [len(images) - held_out, held_out])
    test_set = TensorDataset(digits.test.images, digits.test.labels)
    trainer = L.Trainer(
        max_epochs=epochs,
        logger=CSVLogger(output),
        log_every_n_steps=1,
        callbacks=[LearningRateMonitor(), ModelCheckpoint(monitor="val_accuracy", mode="max")],
    )
    # Lightning would like worker processes, but the images lie in memory already.
    warnings.filterwarnings("ignore", ".*does not have many workers", module="lightning")
    model = LeNet1()
    trainer.fit(model, DataLoader(train_set, BATCH_SIZE, shuffle=True), DataLoader(val_set, BATCH_SIZE))
    trainer.test(model, DataLoader(test_set, BATCH_SIZE), ckpt_path="best")
    return trainer


def main(
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(data.DATASETS)}.")] = "mnist",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the IDX files.")] = None,
    epochs: int = 20,
    seed: int = 0,
    output: Annotated[Path, typer.Option(help="Where the log and the checkpoint go.")] = Path("runs/lightning"),
) -> None:
    """Train LeNet-1 with PyTorch Lightning."""
    train(data.load(dataset, data_dir), epochs=epochs, seed=seed, output=output)


if __name__ == "__main__":
    typer.run(main)
