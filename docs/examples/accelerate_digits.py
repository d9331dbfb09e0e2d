"""Handwritten digits with Accelerate: python docs/examples/accelerate_digits.py [--kappa 0 --rho 0]

In two processes: accelerate launch --multi_gpu --num_processes 2 docs/examples/accelerate_digits.py
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from tqdm import tqdm

from lightning_ire import SAM, AccelerateHost, IREStep, measure_sharpness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kappa", type=float, default=2.0, help="strength of the boost; 0: none")
    parser.add_argument("--rho", type=float, default=0.05, help="radius of SAM; 0: none")
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train, test = random_split(data, [0.8, 0.2])
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=args.epochs * 23)
    model, optimizer, scheduler, train_loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=512)
    )

    def loss_of(batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    # In place of accelerator.backward, clip_grad_norm_, optimizer.step and zero_grad
    step = IREStep(
        model,
        optimizer,
        host=AccelerateHost(accelerator),
        kappa=args.kappa,
        gamma=0.9,
        start_epoch=0 if args.kappa == 0 else args.epochs // 3,
        perturbation=SAM(args.rho) if args.rho else None,
        clip=lambda parameters: accelerator.clip_grad_norm_(parameters, 1.0),
    )
    accelerator.register_for_checkpointing(step)
    for epoch in tqdm(range(args.epochs), desc="epochs", disable=not accelerator.is_main_process):
        step.epoch = epoch
        model.train()
        for batch in train_loader:
            with accelerator.accumulate(model):
                loss = step(loss_of, batch)
                scheduler.step()

    model.eval()
    right = []
    with torch.no_grad():
        for images, labels in test_loader:
            right.append(accelerator.gather_for_metrics(model(images).argmax(1) == labels))
    accuracy = 100 * float(torch.cat(right).float().mean())
    sharpness = measure_sharpness(model, loss_of, [batch], ["lambda_max"], host=step.host)
    accelerator.print(f"kappa {args.kappa:g}, rho {args.rho:g}: {accuracy:.2f} % of the test digits are right,")
    accelerator.print(f"loss {float(loss):.3f}, largest eigenvalue {sharpness.values['sharpness/lambda_max']:.1f}")
    accelerator.print("logged: " + ", ".join(f"{tag} {float(value):.3g}" for tag, value in step.logs.items()))
    accelerator.save_state("accelerate_digits")  # model, optimizer, scheduler, random numbers, and the step


if __name__ == "__main__":
    main()
