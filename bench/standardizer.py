"""Time `Standardizer` beside scikit-learn's StandardScaler, after verifying both: a stream, and a table.

Prints microseconds an observation, the time of a table in one partial_fit, and how far each is from the exact variance at an
offset of 1e8, learned in batches of 1000. Needs scikit-learn. Each time is the best of 5.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from sklearn.preprocessing import StandardScaler

import batchnorm as bn


def best(call: Callable[[], object], calls: int) -> float:
    """Give the least seconds a call takes, of 5 times so many."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - started) / calls)
    return min(times)


def errors(rows: int) -> tuple[float, float]:
    """Give the relative errors of both variances of one feature at an offset of 1e8, by exact arithmetic."""
    x = 1e8 + np.random.default_rng(0).standard_normal((rows, 1))
    ours, theirs = bn.Standardizer(), StandardScaler()
    for at in range(0, rows, 1000):
        ours.partial_fit(x[at : at + 1000])
        theirs.partial_fit(x[at : at + 1000])
    values = [Fraction(float(v)) for v in x[:, 0]]
    mean = sum(values) / rows
    var = sum((v - mean) ** 2 for v in values) / rows
    return tuple(float(abs(Fraction(float(s.var_[0])) - var) / var) for s in (ours, theirs))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=100)
    args = parser.parse_args()
    x = 3 + 2 * np.random.default_rng(0).standard_normal((args.rows, args.features))
    ours, theirs = bn.Standardizer().fit(x), StandardScaler().fit(x)
    np.testing.assert_allclose(ours.var_, theirs.var_, rtol=1e-9)
    np.testing.assert_allclose(ours.transform(x[:1000]), theirs.transform(x[:1000]), rtol=1e-7, atol=1e-9)

    print(
        f"{bn.active_isa()}, {bn.get_num_threads()} threads; relative error of var at 1e8: %.1e, %.1e" % errors(20000)
    )
    norm, observation = bn.Standardizer(17, clip=10.0), np.random.default_rng(0).standard_normal(17)
    print(f"observation of 17 features: {1e6 * best(lambda: norm(observation), 20000):.2f} us")
    for name, table in (("float64", x), ("float32", x.astype(np.float32))):
        mine = best(lambda table=table: bn.Standardizer().partial_fit(table), 1)
        other = best(lambda table=table: StandardScaler().partial_fit(table), 1)
        print(
            f"table {table.shape} {name}: {1e3 * mine:.1f} ms, scikit-learn {1e3 * other:.1f} ms, {other / mine:.1f} times"
        )


if __name__ == "__main__":
    main()
