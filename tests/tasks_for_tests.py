"""Tasks that are not image classification: real ones, small enough to learn in a second."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.tasks import Metric, Split, Task, classification_error, cross_entropy

TEXT = (
    "a space is a graph with choices in it. an architecture is that graph with none left. "
    "a supernet is anything between. a mask acts on the tensor, and whoever reads the weight "
    "sees the masked one. a strategy asks for a trial and is told its result. the log is the "
    "truth, and the cost of a choice is what the kernel that runs it takes. "
)
ALPHABET = "".join(sorted(set(TEXT)))


def regression_task(seed: int = 0, n: int = 400) -> Task:
    """Two smooth functions of six numbers, with noise: (N, 6) float32 to (N, 2) float32."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(n, 6, generator=generator) * 2 - 1
    first = torch.sin(3 * inputs[:, 0]) + inputs[:, 1] * inputs[:, 2]
    second = inputs[:, 3].square() - inputs[:, 4]
    noise = 0.05 * torch.randn(n, 2, generator=generator)
    return Task(
        "regression",
        *_parts(inputs, torch.stack([first, second], dim=1) + noise),
        loss=F.mse_loss,
        measures={"rmse": rmse, "r2": r2},
        metrics=(Metric("rmse", unit="V"), Metric("r2", direction="maximize")),
        outputs=2,
    )


def next_character_task(seed: int = 0, n: int = 300, length: int = 16) -> Task:
    """The next character at each position of a text: (N, T) int64 to (N, T) int64."""
    codes = torch.tensor([ALPHABET.index(character) for character in TEXT + TEXT[:length]])
    starts = torch.randint(len(TEXT), (n,), generator=torch.Generator().manual_seed(seed))
    windows = codes.unfold(0, length + 1, 1)[starts]
    return Task(
        "next-character",
        *_parts(windows[:, :-1], windows[:, 1:]),
        loss=cross_entropy,
        measures={"error": classification_error, "bits": bits},
        metrics=(Metric("error"), Metric("bits", unit="bit/character")),
        outputs=len(ALPHABET),
    )


def next_character_network(width: int = 32) -> nn.Module:
    """Embed each character and its two neighbours to the left, and predict the next."""
    torch.manual_seed(0)
    return _Characters(width)


def train_network(
    network: nn.Module, task: Task, epochs: int, learning_rate: float = 1e-2
) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), learning_rate)
    for _ in range(epochs):
        for inputs, targets in task.batches("train", 32, generator):
            optimizer.zero_grad()
            task.loss(network(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def rmse(outputs: Tensor, targets: Tensor) -> float:
    return (outputs - targets).square().mean().sqrt().item()


def r2(outputs: Tensor, targets: Tensor) -> float:
    residual = (outputs - targets).square().sum()
    return (1 - residual / (targets - targets.mean(dim=0)).square().sum()).item()


def bits(outputs: Tensor, targets: Tensor) -> float:
    return (cross_entropy(outputs, targets) / torch.log(torch.tensor(2.0))).item()


class _Characters(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), width)
        self.mix = nn.Conv1d(width, width, kernel_size=3)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, codes: Tensor) -> Tensor:
        seen = F.pad(self.embedding(codes).transpose(1, 2), (2, 0))
        logits: Tensor = self.head(torch.relu(self.mix(seen)).transpose(1, 2))
        return logits


def _parts(inputs: Tensor, targets: Tensor) -> tuple[Split, Split, Split]:
    whole, order = Split(inputs, targets), torch.arange(len(inputs))
    train, validation, test = order.tensor_split([len(order) * 6 // 10, len(order) * 8 // 10])
    return whole.subset(train), whole.subset(validation), whole.subset(test)
