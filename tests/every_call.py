"""Every public function that works on tensors, with arguments, for tests of what is true of all of them."""

import numpy as np

import batchnorm as bn


class Arguments:
    """Inputs of one dtype, and what earlier calls have saved of them."""

    def __init__(self, shape=(8, 6, 40), dtype=np.float32, seed=0):
        rng = np.random.default_rng(seed)
        channels = shape[1]
        self.x, self.dy, self.v, self.residual = (rng.normal(2, 3, shape).astype(dtype) for _ in range(4))
        self.gamma, self.beta, self.mean = (rng.uniform(1, 2, channels) for _ in range(3))
        self.var = rng.uniform(1, 2, channels)
        positions = (shape[0], *shape[2:])
        self.mask = rng.random(positions) < 0.7
        self.weights = rng.uniform(0.5, 2, positions)
        self.segments = np.sort(rng.integers(0, max(shape[0] // 3, 1), shape[0]))
        self.out, self.out2 = np.full(shape, 7, dtype), np.full(shape, 7, dtype)
        given = (self.x, self.gamma, self.beta)
        self.saved = bn.batch_norm(*given)[1]
        self.saved_mask = bn.batch_norm(*given, mask=self.mask)[1]
        self.saved_segments = bn.batch_norm(*given, segments=self.segments)[1]
        self.saved_ghosts = bn.batch_norm(*given, ghost_size=3)[1]
        self.saved_relu = bn.batch_norm(*given, residual=self.residual, activation="relu")[1]
        self.renorm = bn.Renorm(self.mean, self.var, 3.0, 5.0)
        self.saved_renorm = bn.batch_norm(*given, renorm=self.renorm)[1]
        self.saved_y = bn.batch_norm(*given, keep="y")[1]
        self.saved_given = bn.normalize(self.x, *self.statistics, save=True)[1]
        self.saved_given_mask = bn.normalize(self.x, *self.statistics, mask=self.mask, save=True)[1]
        self.saved_given_relu = bn.normalize(self.x, *self.statistics, activation="relu", save=True)[1]
        self.sums = bn.grad_sums(self.dy, self.saved)

    @property
    def statistics(self):
        return self.mean, self.var, self.gamma


# Each takes the arguments and options, of which all know num_threads and those with `out` know that.
WITH_OUT = {
    "batch_norm": lambda a, **o: bn.batch_norm(a.x, a.gamma, a.beta, **o),
    "batch_norm with mask": lambda a, **o: bn.batch_norm(a.x, a.gamma, a.beta, mask=a.mask, **o),
    "batch_norm with weights": lambda a, **o: bn.batch_norm(a.x, a.gamma, a.beta, weights=a.weights, **o),
    "batch_norm with segments": lambda a, **o: bn.batch_norm(a.x, a.gamma, a.beta, segments=a.segments, **o),
    "batch_norm with ghosts": lambda a, **o: bn.batch_norm(a.x, a.gamma, a.beta, ghost_size=3, **o),
    "batch_norm with renorm": lambda a, **o: bn.batch_norm(a.x, a.gamma, a.beta, renorm=a.renorm, **o),
    "batch_norm with relu": lambda a, **o: bn.batch_norm(
        a.x, a.gamma, a.beta, residual=a.residual, activation="relu", **o
    ),
    "batch_norm with residual": lambda a, **o: bn.batch_norm(a.x, a.gamma, a.beta, residual=a.residual, **o),
    "batch_norm with mask and relu": lambda a, **o: bn.batch_norm(
        a.x, a.gamma, a.beta, mask=a.mask, activation="relu", **o
    ),
    "batch_norm that keeps y": lambda a, **o: bn.batch_norm(a.x, a.gamma, a.beta, keep="y", **o),
    "normalize": lambda a, **o: bn.normalize(a.x, *a.statistics, a.beta, **o),
    "normalize with mask": lambda a, **o: bn.normalize(a.x, *a.statistics, a.beta, mask=a.mask, **o),
    "normalize with relu": lambda a, **o: bn.normalize(a.x, *a.statistics, a.beta, activation="relu", save=True, **o),
    "backward": lambda a, **o: bn.backward(a.dy, a.saved, **o),
    "backward with mask": lambda a, **o: bn.backward(a.dy, a.saved_mask, **o),
    "backward with segments": lambda a, **o: bn.backward(a.dy, a.saved_segments, **o),
    "backward with ghosts": lambda a, **o: bn.backward(a.dy, a.saved_ghosts, **o),
    "backward with renorm": lambda a, **o: bn.backward(a.dy, a.saved_renorm, **o),
    "backward from y": lambda a, **o: bn.backward(a.dy, a.saved_y, **o),
    "backward of normalize": lambda a, **o: bn.backward(a.dy, a.saved_given, **o),
    "backward of normalize with mask": lambda a, **o: bn.backward(a.dy, a.saved_given_mask, **o),
    "grad_input": lambda a, **o: bn.grad_input(a.dy, a.saved, a.sums, **o),
    "jvp": lambda a, **o: bn.jvp(a.v, a.saved, gamma_dot=a.mean, **o),
    "jvp with mask": lambda a, **o: bn.jvp(a.v, a.saved_mask, gamma_dot=a.mean, **o),
    "jvp of normalize": lambda a, **o: bn.jvp(a.v, a.saved_given, var_dot=a.mean, **o),
}
WITH_TWO_OUT = {
    "backward with relu": lambda a, **o: bn.backward(a.dy, a.saved_relu, **o),
    "backward of normalize with relu": lambda a, **o: bn.backward(a.dy, a.saved_given_relu, **o),
    "double_backward": lambda a, **o: bn.double_backward(a.v, a.dy, a.saved, v_dgamma=a.mean, **o),
    "double_backward of normalize": lambda a, **o: bn.double_backward(a.v, a.dy, a.saved_given, v_dgamma=a.mean, **o),
}
WITHOUT_OUT = {
    "moments": lambda a, **o: bn.moments(a.x, **o),
    "moments with mask": lambda a, **o: bn.moments(a.x, mask=a.mask, **o),
    "moments with segments": lambda a, **o: bn.moments(a.x, segments=a.segments, **o),
    "grad_sums": lambda a, **o: bn.grad_sums(a.dy, a.saved, **o),
    "grad_sums with mask": lambda a, **o: bn.grad_sums(a.dy, a.saved_mask, **o),
    "batch_norm in place": lambda a, **o: bn.batch_norm(a.x, a.gamma, a.beta, keep="y", out=a.x, **o),
}
ALL = {**WITH_OUT, **WITH_TWO_OUT, **WITHOUT_OUT}
