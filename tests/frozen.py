"""Derivatives of `normalize`, whose statistics are given, in one call."""

import batchnorm as bn


def saved_of(x, mean, var, gamma=None, **options):
    """Give what `normalize` saves of a call."""
    return bn.normalize(x, mean, var, gamma, save=True, **options)[1]


def _with_saved(verb, tensors, given, options, names):
    rest = {name: options.pop(name) for name in names if name in options}
    return verb(*tensors, saved_of(*given, **options), **rest)


def backward(dy, x, mean, var, gamma=None, **options):
    return _with_saved(bn.backward, (dy,), (x, mean, var, gamma), options, ("needs", "out", "num_threads"))


def jvp(x_dot, x, mean, var, gamma=None, **options):
    names = ("mean_dot", "var_dot", "gamma_dot", "beta_dot", "out", "num_threads")
    return _with_saved(bn.jvp, (x_dot,), (x, mean, var, gamma), options, names)


def double_backward(v_dx, dy, x, mean, var, gamma=None, **options):
    names = ("v_dgamma", "v_dbeta", "needs", "out", "num_threads")
    return _with_saved(bn.double_backward, (v_dx, dy), (x, mean, var, gamma), options, names)
