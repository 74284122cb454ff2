"""Training forward of this library and of PyTorch on the same shape, each in processes of its own, in turns.

Idle OpenMP workers spin and take the core of whoever is measured next, so two libraries never share a process.

    python bench/compare_torch.py [--shape 32 256 56 56] [--threads 2] [--rounds 5]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

EPS = 1e-5


def milliseconds(work, repeats=15):
    """Median time of one call, after two calls that are not counted."""
    for _ in range(2):
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure_batchnorm(shape, threads):
    import numpy as np

    import batchnorm as bn

    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    gamma, beta, y = np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32), np.empty_like(x)
    call = milliseconds(lambda: bn.batch_norm(x, gamma, beta, eps=EPS, out=y, num_threads=threads))
    assert abs(float(y[:, 0].mean())) < 1e-5
    assert abs(float(y[:, 0].std()) - 1) < 1e-4
    return {"batch_norm, out=": call}


def measure_torch(shape, threads):
    import torch

    torch.set_num_threads(threads)
    x = torch.randn(shape)
    weight, bias = torch.ones(shape[1]), torch.zeros(shape[1])
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    outputs = (torch.empty_like(x), torch.empty(shape[1]), torch.empty(shape[1]))

    def with_out():
        torch.native_batch_norm(x, weight, bias, mean, var, True, 0.1, EPS, out=outputs)

    def functional():
        torch.nn.functional.batch_norm(x, mean, var, weight, bias, True, 0.1, EPS)

    with torch.no_grad():
        return {
            "torch.native_batch_norm, out=": milliseconds(with_out),
            "F.batch_norm": milliseconds(functional),
        }


def in_own_process(library, arguments):
    command = [sys.executable, __file__, "--measure", library, "--threads", str(arguments.threads), "--shape"]
    done = subprocess.run([*command, *map(str, arguments.shape)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs="+", default=[32, 256, 56, 56], help="N C H W")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", choices=["batchnorm", "torch"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure = {"batchnorm": measure_batchnorm, "torch": measure_torch}[arguments.measure]
        print(json.dumps(measure(tuple(arguments.shape), arguments.threads)))
        return
    times = {}
    for _ in range(arguments.rounds):
        for library in ("batchnorm", "torch"):
            for name, value in in_own_process(library, arguments).items():
                times.setdefault(name, []).append(value)
    ours = statistics.median(times["batch_norm, out="])
    print(f"float32 {tuple(arguments.shape)}, {arguments.threads} threads, {arguments.rounds} rounds")
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{name:30s} {median:8.2f} ms (from {min(values):.2f} to {max(values):.2f})  {median / ours:5.2f} x ours"
        )


if __name__ == "__main__":
    main()
