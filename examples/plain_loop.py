"""Prune a small network in a loop of your own: python examples/plain_loop.py.

CK pruning removes 60 % of the kernels of the digits' network while it trains, in seconds on a CPU.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from starfire_prune import Pruner, format_table
from starfire_prune.data import load_datasets

EPOCHS = 6

torch.manual_seed(0)
digits = load_datasets("digits", image_size=16)
train = DataLoader(digits.train, batch_size=64, shuffle=True)
val = DataLoader(digits.val, batch_size=360)

model = nn.Sequential(
    nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 4 * 4, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

# Dense epochs 0 and 1, masks that tighten in epochs 2 and 3, frozen masks in epochs 4 and 5
pruner = Pruner(
    model,
    {"method": "ck", "amount": 0.6, "era": [2, 4]},
    updates_per_epoch=len(train),
    optimizer=optimizer,
)

for epoch in range(EPOCHS):
    model.train()
    for images, labels in train:
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        pruner.step()  # after each update: pruned weights are zero at the next forward pass
        optimizer.zero_grad()
    pruner.end_epoch(epoch)

    model.eval()
    with torch.no_grad():
        correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels in val)
    accuracy, sparsity = correct / len(digits.val), pruner.sparsity().network
    print(f"epoch {epoch}: top-1 {accuracy:.1%}, sparsity {sparsity:.1%}")

pruner.check()  # raises an error if a pruned weight is not zero
print(format_table(pruner.sparsity()))
