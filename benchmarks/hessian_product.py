"""How long a Hessian product takes, next to a forward and backward pass on the same batch, one CPU thread.

    OMP_NUM_THREADS=1 python benchmarks/hessian_product.py

Prints ratios of the fastest of several tries, all made in one run and in turn. Measured on two shared cores of an
x86_64 machine with torch 2.15 (three runs): a product takes 1.7 to 2.3 times as long as a forward and backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import turns

from lightning_ire.functional import hessian_product
from lightning_ire.models import ResNet

TRIES = 7


def models() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True, dropout=0.0)
    transformer = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(256 * 64, 10))
    return {
        "ResNet-8 of the digits config, 64 x 1 x 8 x 8": (
            ResNet(in_channels=1, num_classes=10, blocks=[1, 1, 1], widths=[16, 32, 64]),
            torch.randn(64, 1, 8, 8),
        ),
        "ResNet-20, 64 x 3 x 32 x 32": (
            ResNet(in_channels=3, num_classes=10, blocks=[3, 3, 3], widths=[16, 32, 64]),
            torch.randn(64, 3, 32, 32),
        ),
        "Transformer, 2 layers, width 256, 16 x 64 tokens": (transformer, torch.randn(16, 64, 256)),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, one CPU thread, fastest of {TRIES}")
    for name, (net, x) in models().items():
        net.eval()
        y = torch.randint(10, (len(x),))
        parameters = list(net.parameters())
        with sdpa_kernel(SDPBackend.MATH):

            def loss(net: nn.Module = net, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                return F.cross_entropy(net(x), y)

            gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
            vector = [torch.randn_like(parameter) for parameter in parameters]
            times = turns(
                {
                    "training pass": lambda: torch.autograd.grad(loss(), parameters),  # noqa: B023
                    "gradient with its graph": lambda: torch.autograd.grad(loss(), parameters, create_graph=True),  # noqa: B023
                    "Hessian product": lambda: hessian_product(gradients, parameters, vector),  # noqa: B023
                },
                TRIES,
                "cpu",
            )
            seconds = {what: min(tries) for what, tries in times.items()}
        base = seconds["training pass"]
        ratios = ", ".join(f"{what} {value / base:.2f}" for what, value in seconds.items())
        print(f"{name}: {ratios}")


if __name__ == "__main__":
    main()
