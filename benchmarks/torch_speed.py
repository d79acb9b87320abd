"""The authors' PyTorch package, absgd 0.0.1, at the work of benchmarks.speed, which starts this.

For every line on standard input it trains for an epoch, and answers with the seconds. It needs no
JAX: it is given a file of examples, their order, and the parameters to start from; and, as JSON,
the model, λ, the learning rate, the threads, and whether to compile.
"""

import collections
import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from absgd.losses import ABLoss
from absgd.optimizers import ABSGD
from torch import nn


def named(**modules):
    return nn.Sequential(collections.OrderedDict(modules))


class Flatten(nn.Module):
    def forward(self, x):
        if x.ndim == 4:  # as JAX's images are flattened; no copy, where they lie so
            x = x.permute(0, 2, 3, 1)
        return x.flatten(1)


def dense(inputs, outputs):
    return named(flatten=Flatten(), linear=nn.Linear(inputs, outputs), relu=nn.ReLU())


def convolution(inputs, outputs):
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    return named(conv=conv, relu=nn.ReLU(), pool=nn.MaxPool2d(2))


def normalized_convolution(inputs, outputs, stride=1):
    # With a stride of 2 JAX's "SAME" pads on one side alone; that would be one more copy here.
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return named(conv=conv, norm=nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first = normalized_convolution(inputs, outputs, stride)
        self.second = normalized_convolution(outputs, outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x):
        y = self.second(F.relu(self.first(x)))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, [0] * 4 + [self.padding] * 2))


def classifier(model, shape, classes):
    """As benchmarks.engine.models.Classifier; its parameters have the same names."""
    height, width, channels = shape
    if model == "mlp":
        blocks = [dense(height * width * channels, 256), dense(256, 128)]
    elif model == "cnn":
        pooled = (height // 4) * (width // 4) * 64
        blocks = [convolution(channels, 32), convolution(32, 64), dense(pooled, 128)]
    else:
        blocks = [nn.Sequential(normalized_convolution(channels, 16), nn.ReLU())]
        for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
            rest = [Residual(outputs, outputs, 1) for _ in range(4)]
            first = Residual(inputs, outputs, outputs // inputs)
            blocks.append(nn.Sequential(first, *rest))
        blocks.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), Flatten()))
    features = 64 if model == "resnet32" else 128
    return named(blocks=nn.Sequential(*blocks), head=nn.Linear(features, classes))


def main():
    file, model, temperature, rate, threads, compiled = sys.argv[1], *json.loads(sys.argv[2])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # TF32 where there is any, as JAX has it by default

    arrays = dict(np.load(file))
    inputs = torch.tensor(arrays.pop("inputs")).permute(0, 3, 1, 2).to(device)
    labels = torch.tensor(arrays.pop("labels")).long().to(device)
    order = torch.tensor(arrays.pop("order")).long().to(device)
    _, channels, height, width = inputs.shape
    network = classifier(model, (height, width, channels), len(arrays["head.bias"]))
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(torch.tensor(arrays.pop(name)))
    assert not arrays, f"there are parameters beside those of {model}: {list(arrays)}"
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = ABSGD(network.parameters(), lr=rate)
    criterion = ABLoss(temperature)
    criterion.updateLambda()  # on from the first step
    forward = torch.compile(network) if compiled else network

    def epoch():
        for index in order:
            loss = criterion(forward(inputs[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss)  # the device has then done its work

    epoch()
    with torch.no_grad():
        loss = F.cross_entropy(network(inputs[order[0]]), labels[order[0]])
    said = {"torch": torch.__version__, "device": device, "loss": float(loss)}
    print(json.dumps(said), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        epoch()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
