"""Handwritten digits with Lightning Fabric: python docs/examples/fabric_digits.py [--kappa 0 --rho 0] [--devices 2]"""

import argparse

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from tqdm import tqdm

from lightning_ire import SAM, FabricHost, IREStep, measure_sharpness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kappa", type=float, default=2.0, help="strength of the boost; 0: none")
    parser.add_argument("--rho", type=float, default=0.05, help="radius of SAM; 0: none")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()

    fabric = Fabric(accelerator="cpu", devices=args.devices, strategy="ddp" if args.devices > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train, test = random_split(data, [0.8, 0.2])
    train_loader, test_loader = fabric.setup_dataloaders(
        DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=512)
    )
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))

    def loss_of(batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    # The five lines of a Fabric loop (zero_grad, forward, backward, clip, step) are one call of this
    step = IREStep(
        model,
        optimizer,
        host=FabricHost(fabric),
        kappa=args.kappa,
        gamma=0.9,
        start_epoch=0 if args.kappa == 0 else args.epochs // 3,
        perturbation=SAM(args.rho) if args.rho else None,
        clip=lambda _: fabric.clip_gradients(model, optimizer, max_norm=1.0),
    )
    for epoch in tqdm(range(args.epochs), desc="epochs", disable=not fabric.is_global_zero):
        step.epoch = epoch
        model.train()
        for batch in train_loader:
            loss = step(loss_of, batch)

    model.eval()
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) == y for x, y in test_loader]).float().mean()
    right = fabric.all_reduce(right)
    sharpness = measure_sharpness(model, loss_of, [next(iter(train_loader))], ["lambda_max"], host=step.host)
    fabric.print(f"kappa {args.kappa:g}, rho {args.rho:g}: {100 * float(right):.2f} % of the test digits are right,")
    fabric.print(f"loss {float(loss):.3f}, largest eigenvalue {sharpness.values['sharpness/lambda_max']:.1f}")
    fabric.print("logged: " + ", ".join(f"{tag} {float(value):.3g}" for tag, value in step.logs.items()))
    fabric.save("fabric_digits.ckpt", {"model": model, "optimizer": optimizer, "ire": step.state_dict()})


if __name__ == "__main__":
    main()
