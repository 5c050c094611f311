"""Prune under Accelerate, in one process or several: accelerate launch examples/accelerate_loop.py.

Each process trains on its part of the batches; the masks are the same in all of them.
"""

import timm
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from starfire_prune import Pruner, save_pruned
from starfire_prune.data import load_datasets

EPOCHS = 4

torch.manual_seed(0)
accelerator = Accelerator()
digits = load_datasets("digits", image_size=16)
model = timm.create_model("test_resnet", num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
model, optimizer, train, val = accelerator.prepare(
    model,
    optimizer,
    DataLoader(digits.train, batch_size=64, shuffle=True),
    DataLoader(digits.val, batch_size=360),
)

# Single weights within each kernel, "window", in all layers but the classifier
settings = {"method": "window", "amount": 0.5, "era": [1, 3], "exclude": ["fc"]}
pruner = Pruner(model, settings, updates_per_epoch=len(train), optimizer=optimizer)

for epoch in range(EPOCHS):
    model.train()
    for images, labels in train:
        accelerator.backward(cross_entropy(model(images), labels))
        optimizer.step()
        pruner.step(updated=not optimizer.step_was_skipped)  # fp16 skips steps that overflow
        optimizer.zero_grad()
    pruner.end_epoch(epoch)

    model.eval()
    correct = 0
    for images, labels in val:
        with torch.no_grad():
            predicted = model(images).argmax(1)
        gathered, wanted = accelerator.gather_for_metrics((predicted, labels))
        correct += int((gathered == wanted).sum())
    accuracy, sparsity = correct / len(digits.val), pruner.sparsity().network
    accelerator.print(f"epoch {epoch}: top-1 {accuracy:.1%}, sparsity {sparsity:.1%}")

pruner.check()
if accelerator.is_main_process:
    save_pruned(accelerator.unwrap_model(model), "digits.safetensors")  # without the zeros
    print("weights: digits.safetensors")
