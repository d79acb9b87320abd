"""Data-parallel training, on one host or on several: the step is that of one device.

    JAX_NUM_CPU_DEVICES=8 python examples/data_parallel.py

    # On two hosts, of which the first is HOST; --process-id is 0 there, and 1 on the other:
    python examples/data_parallel.py --coordinator HOST:PORT --num-processes 2 --process-id 0
    # On every host of a TPU pod, or in every task of a cluster that JAX knows, such as Slurm:
    python examples/data_parallel.py --coordinator auto

Each batch is one global array, spread over all devices. The mean of its losses is that of the whole
batch, and so are the gradients and the sums from which λ tunes itself. So the parameters are those
that one device ends with, to rounding: on 8 devices the difference is 1e-07 of the largest
parameter, after 200 steps on scikit-learn's digits. On a GPU or TPU leave out JAX_NUM_CPU_DEVICES,
which makes so many devices of one CPU.
"""

import argparse
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from absgd_jax import absgd, get_temperature, Sums, target_ess, tilt

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
tx = absgd(0.1, temperature=target_ess(0.9))


@jax.jit
def train_step(params, opt_state, images, labels):
    def loss_fn(params, sums):
        return tilt(cross_entropy(images @ params, labels), opt_state, sums).mean()

    loss, (grads, sums) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params, Sums())
    updates, opt_state = tx.update(grads, opt_state, params, sums=sums)
    return optax.apply_updates(params, updates), opt_state, loss


def train(devices, images, labels):
    """Weights [64, 10], λ and the last loss, after steps on batches of which these are own rows."""
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices)
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    params = jnp.zeros((64, 10))
    params, opt_state = jax.device_put((params, tx.init(params)), whole)
    for local in zip(images, labels, strict=True):
        batch = (jax.make_array_from_process_local_data(rows, a) for a in local)
        params, opt_state, loss = train_step(params, opt_state, *batch)
        # One step at a time: queued steps of devices that share a CPU can deadlock.
        loss.block_until_ready()
    return np.asarray(params), float(get_temperature(opt_state)), float(loss)


def join(args, error):
    """Joins the other processes, before anything asks for devices."""
    address, n, i = args.coordinator, args.num_processes, args.process_id
    flags = {"--num-processes": n, "--process-id": i}
    given = " ".join(f"{flag} {value}" for flag, value in flags.items() if value is not None)
    missing = " and ".join(flag for flag, value in flags.items() if value is None)
    if given and address in (None, "auto"):
        error(f"{given} needs --coordinator HOST:PORT, got {address}: give that, or leave out both")
    if address == "auto":
        try:
            jax.distributed.initialize()
        except ValueError:
            error("--coordinator auto finds no cluster: give HOST:PORT of process 0 instead")
    elif address is not None:
        if not re.fullmatch(r".+:\d+", address):
            error(f"--coordinator must be HOST:PORT of process 0, or auto, got {address}")
        if missing:
            error(f"--coordinator {address} needs {missing}: give all three, or none")
        if not 0 <= i < n:
            error(f"--process-id must lie in [0, --num-processes), got {given}: count from 0")
        jax.distributed.initialize(address, n, i)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128, help="of all processes together")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, or auto")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    join(args, parser.error)
    if args.batch_size < 1 or args.batch_size % jax.device_count():
        n = jax.device_count()
        parser.error(f"--batch-size must be a multiple of the {n} devices, got {args.batch_size}")

    images, labels = load_digits(return_X_y=True)
    images = np.float32(images / 16)
    # All processes draw the same indices, and each reads its own rows alone.
    batches = np.random.default_rng(0).integers(1300, size=(args.steps, args.batch_size))
    own = np.split(batches, jax.process_count(), axis=1)[jax.process_index()]
    params, lam, loss = train(jax.devices(), images[own], labels[own])
    if jax.process_index() > 0:
        return
    alone, *_ = train(jax.local_devices()[:1], images[batches], labels[batches])
    difference = np.abs(params - alone).max() / np.abs(alone).max()
    accuracy = np.mean(np.argmax(images[1300:] @ params, axis=-1) == labels[1300:])
    print(f"devices: {jax.device_count()}, processes: {jax.process_count()}")
    print(f"last loss: {loss:.6f}, λ: {lam:.6f}")
    print(f"test accuracy: {100 * accuracy:.1f} %")
    print(f"largest difference from one device, relative: {difference:.0e}")


if __name__ == "__main__":
    main()
