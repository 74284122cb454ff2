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
        self.saved_ghosts = bn.ghost_batch_norm(*given, ghost_size=3)[1]
        self.saved_relu = bn.batch_norm_relu(*given, residual=self.residual)[1]
        self.saved_renorm = self.renorm(out=None)[1]
        self.saved_inplace = bn.batch_norm_inplace(self.x.copy(), self.gamma, self.beta)[1]
        self.relu_mask = bn.normalize_relu(self.x, self.mean, self.var, needs_mask=True).mask
        self.sums = bn.grad_sums(self.dy, self.saved)

    @property
    def statistics(self):
        return self.mean, self.var, self.gamma

    def renorm(self, **options):
        limits = {"r_max": 3.0, "d_max": 5.0}
        return bn.batch_renorm(self.x, self.mean, self.var, self.gamma, self.beta, **limits, **options)


# Each takes the arguments and options, of which all know num_threads and those with `out` know that.
WITH_OUT = {
    "batch_norm": lambda a, **o: bn.batch_norm(a.x, a.gamma, a.beta, **o),
    "batch_norm_mask": lambda a, **o: bn.batch_norm(a.x, a.gamma, a.beta, mask=a.mask, **o),
    "batch_norm_weights": lambda a, **o: bn.batch_norm(a.x, a.gamma, a.beta, weights=a.weights, **o),
    "batch_norm_segments": lambda a, **o: bn.batch_norm(a.x, a.gamma, a.beta, segments=a.segments, **o),
    "normalize": lambda a, **o: bn.normalize(a.x, *a.statistics, a.beta, **o),
    "normalize_mask": lambda a, **o: bn.normalize(a.x, *a.statistics, a.beta, mask=a.mask, **o),
    "batch_norm_backward": lambda a, **o: bn.batch_norm_backward(a.dy, a.saved, **o),
    "batch_norm_backward_mask": lambda a, **o: bn.batch_norm_backward(a.dy, a.saved_mask, **o),
    "batch_norm_backward_segments": lambda a, **o: bn.batch_norm_backward(a.dy, a.saved_segments, **o),
    "normalize_backward": lambda a, **o: bn.normalize_backward(a.dy, a.x, *a.statistics, **o),
    "normalize_backward_mask": lambda a, **o: bn.normalize_backward(
        a.dy, a.x, *a.statistics, mask=a.mask, **o
    ),
    "grad_input": lambda a, **o: bn.grad_input(a.dy, a.saved, a.sums, **o),
    "batch_norm_jvp": lambda a, **o: bn.batch_norm_jvp(a.v, a.saved, gamma_dot=a.mean, **o),
    "normalize_jvp": lambda a, **o: bn.normalize_jvp(a.v, a.x, *a.statistics, var_dot=a.mean, **o),
    "ghost_batch_norm": lambda a, **o: bn.ghost_batch_norm(a.x, a.gamma, a.beta, ghost_size=3, **o),
    "ghost_batch_norm_backward": lambda a, **o: bn.ghost_batch_norm_backward(a.dy, a.saved_ghosts, **o),
    "batch_renorm": lambda a, **o: a.renorm(**o),
    "batch_renorm_backward": lambda a, **o: bn.batch_renorm_backward(a.dy, a.saved_renorm, **o),
    "batch_norm_inplace_backward": lambda a, **o: bn.batch_norm_inplace_backward(a.dy, a.saved_inplace, **o),
    "batch_norm_relu": lambda a, **o: bn.batch_norm_relu(a.x, a.gamma, a.beta, residual=a.residual, **o),
    "normalize_relu": lambda a, **o: bn.normalize_relu(a.x, *a.statistics, a.beta, needs_mask=True, **o),
}
WITH_TWO_OUT = {
    "batch_norm_relu_backward": lambda a, **o: bn.batch_norm_relu_backward(a.dy, a.saved_relu, **o),
    "normalize_relu_backward": lambda a, **o: bn.normalize_relu_backward(
        a.dy, a.x, a.relu_mask, *a.statistics, **o
    ),
    "batch_norm_double_backward": lambda a, **o: bn.batch_norm_double_backward(
        a.v, a.dy, a.saved, v_dgamma=a.mean, **o
    ),
    "normalize_double_backward": lambda a, **o: bn.normalize_double_backward(
        a.v, a.dy, a.x, *a.statistics, v_dgamma=a.mean, **o
    ),
}
WITHOUT_OUT = {
    "moments": lambda a, **o: bn.moments(a.x, **o),
    "moments_mask": lambda a, **o: bn.moments(a.x, mask=a.mask, **o),
    "moments_segments": lambda a, **o: bn.moments(a.x, segments=a.segments, **o),
    "grad_sums": lambda a, **o: bn.grad_sums(a.dy, a.saved, **o),
    "grad_sums_mask": lambda a, **o: bn.grad_sums(a.dy, a.saved_mask, **o),
    "batch_norm_inplace": lambda a, **o: bn.batch_norm_inplace(a.x, a.gamma, a.beta, **o),
}
ALL = {**WITH_OUT, **WITH_TWO_OUT, **WITHOUT_OUT}
