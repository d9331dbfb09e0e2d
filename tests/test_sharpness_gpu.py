"""The monitor on a CUDA device: the numbers of the CPU, and no trace there either."""

from typing import Any

import cases
import pytest
import torch
from cases import CLASSES, FEATURES
from modules import Classifier, Net
from torch import Tensor, nn

from lightning_ire import SharpnessMonitor, tags

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Attending(nn.Module):
    """Attention and a recurrent layer: neither has a second derivative in the kernels that a GPU prefers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.embed, self.recurrent, self.head = nn.Linear(1, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.attention(self.embed(x.unsqueeze(-1))))[0][:, -1])


@pytest.mark.parametrize("net", [lambda: Net(batch_norm=True, dropout=0.2), Attending], ids=["norm", "attention"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_same_numbers_as_on_the_cpu_and_the_same_training_as_without(net: Any, precision: str) -> None:
    quantities = ["trace_fisher", "trace_hessian", "lambda_max", "ascent_gap", "stability", "spectral_density"]
    torch.manual_seed(0)
    start = Classifier(net())
    assert FEATURES == 6
    cuda = {"accelerator": "cuda", "precision": precision}
    plain, watched = cases.clone(start), cases.clone(start)
    cases.fit(plain, **cuda)
    after = torch.cuda.get_rng_state()
    monitor = SharpnessMonitor(every_n_steps=3, quantities=quantities)
    trainer = cases.fit(watched, [monitor], **cuda)
    cases.assert_same_bits(plain, watched)
    assert torch.equal(after, torch.cuda.get_rng_state())
    assert not monitor.last.skipped

    there = monitor.measure(trainer, watched).values
    host = cases.clone(start)
    here_trainer = cases.fit(host, max_epochs=1, limit_train_batches=1)
    host.load_state_dict({name: value.cpu() for name, value in watched.state_dict().items()})
    here = SharpnessMonitor(quantities=["lambda_max", "ascent_gap"]).measure(here_trainer, host).values
    for tag in (tags.LAMBDA_MAX, tags.ASCENT_GAP):
        assert there[tag] == pytest.approx(here[tag], rel=5e-3)
