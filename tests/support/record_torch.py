"""Records what the authors' PyTorch package, absgd 0.0.1, does on the runs of reference.py.

    python -m tests.support.record_torch            writes torch_trajectories.npz
    python -m tests.support.record_torch --check    compares with what the package does now: the
                                                    file, and the transcription at every step

Needs the extra `reference`. The file holds, in float64, the loss of every step and all parameters
after every 50th.
"""

import argparse
import pathlib
import sys

import numpy as np
import torch
from absgd.losses import ABLoss
from absgd.optimizers import ABAdam, ABSGD

from tests.support.reference import (
    ADAM_CASES,
    ADAM_RATE,
    problem,
    relative,
    SGD_CASES,
    SGD_RATE,
    SNAPSHOTS,
    train_all,
)

FILE = pathlib.Path(__file__).with_name("torch_trajectories.npz")


def train(optimizer, case):
    initial, xs, ys = problem()
    params = {k: torch.tensor(p, requires_grad=True) for k, p in initial.items()}
    build, rate = {"sgd": (ABSGD, SGD_RATE), "adam": (ABAdam, ADAM_RATE)}[optimizer]
    tx = build(list(params.values()), lr=rate, weight_decay=case.weight_decay)
    # Updated before every step, its λ is on from step `milestone - 1`.
    criterion = ABLoss(
        case.temperature, milestone=case.switch + 1, abgamma=case.gamma, abalpha=case.alpha
    )
    trajectory, values = [], []
    for x, y in zip(torch.tensor(xs), torch.tensor(ys), strict=True):
        criterion.updateLambda()
        hidden = torch.tanh(x @ params["w1"] + params["b1"])
        loss = criterion(hidden @ params["w2"] + params["b2"], y)
        tx.zero_grad()
        loss.backward()
        tx.step()
        values.append(loss.item())
        trajectory.append({k: p.detach().numpy().copy() for k, p in params.items()})
    return {k: np.stack([p[k] for p in trajectory]) for k in params}, np.array(values)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args().check
    torch.set_num_threads(1)

    arrays = {}
    for optimizer, cases in (("sgd", SGD_CASES), ("adam", ADAM_CASES)):
        runs = [train(optimizer, case) for case in cases]
        params = {k: np.stack([run[0][k] for run in runs]) for k in runs[0][0]}
        values = np.stack([run[1] for run in runs])
        arrays |= {f"{optimizer}/{k}": p[:, SNAPSHOTS] for k, p in params.items()}
        arrays[f"{optimizer}/losses"] = values
        if check:
            expected = train_all(optimizer, cases)[0]
            actual, expected = relative(params, expected), relative(expected, expected)
            error = np.max([np.abs(actual[k] - expected[k]).max() for k in expected])
            print(f"{optimizer}: NumPy transcription within {error:.1e}, every parameter and step")
            if not error < 1e-12:
                sys.exit("the transcription is no longer what the package does")
    if not check:
        np.savez_compressed(FILE, **arrays)
        print(f"wrote {FILE}, {FILE.stat().st_size / 1024:.0f} KiB")
        return
    with np.load(FILE) as recorded:
        if set(recorded.files) != set(arrays):
            sys.exit(f"{FILE} holds other arrays: record it again")
        # np.max and not max, which would pass over a NaN.
        error = np.max([np.abs(recorded[k] - a).max() / np.abs(a).max() for k, a in arrays.items()])
    print(f"{FILE.name}: within {error:.1e} of the package")
    if not error < 1e-12:
        sys.exit(f"{FILE} does not say what the package does: record it again")


if __name__ == "__main__":
    main()
