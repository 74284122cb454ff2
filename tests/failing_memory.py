"""Lets memory run out as soon as the core has written, in each function and in the layer, and prints what minded.

A program for a process with tests/failing_malloc.c before its other libraries, and PYTHONMALLOC=malloc. (What fails
before that has written nothing; and NumPy ends the process where some of its own allocations fail.)
"""

import ctypes

import numpy as np

import batchnorm as bn
from batchnorm import _core, forward
from every_call import WITH_OUT, WITH_TWO_OUT, WITHOUT_OUT, Arguments

# Set without a call, which would take memory itself.
GOOD, FAILING = (ctypes.c_long.in_dll(ctypes.CDLL(None), name) for name in ("good_allocations", "failing_allocations"))
MANY = 200


def failing_afterwards(function):
    """Give a core function after which no allocation succeeds, where it has done something."""
    may_decline = function.__name__.startswith("try_")

    def call(*arguments, **options):
        result = function(*arguments, **options)
        FAILING.value = 0 if may_decline and result is None else MANY
        return result

    return call


def wrap_core():
    """Let memory run out after each call that writes a tensor."""
    for name in dir(_core):
        if any(part in name for part in ("batch_norm", "normalize", "grad_input", "backward", "jvp")):
            setattr(_core, name, failing_afterwards(getattr(_core, name)))


def raises(call, good=0, failing=0):
    """Tell whether the call raises where, after some good allocations, some fail."""
    raised = False
    try:
        GOOD.value, FAILING.value = good, failing
        call()
    except MemoryError:
        raised = True
    GOOD.value = FAILING.value = 0
    return raised


def written(a):
    """Give the bytes of all that a call may write to."""
    return [each.tobytes() for each in (a.x, a.out, a.out2)]


def state_of(layer):
    return {name: value.tobytes() for name, value in layer.state_dict().items()}


def ordinary_calls(a):
    """Give the calls that do all in C, from the arguments to the results."""
    saved, table = a.saved_relu, a.saved.moments._table
    a.options = {"mask": a.mask, "residual": a.residual, "activation": "relu"}
    a.counts = np.ones(a.mask.size, a.x.dtype)
    given, tail = (a.mean, a.var, a.gamma), (1, 1e-5)
    needs = ("x", "gamma", "beta")
    return {
        "moments": lambda out: _core.try_moments(a.x, 1, None),
        "batch_norm": lambda out: _core.try_batch_norm(
            forward.ordinary_saved, a.x, a.gamma, a.beta, *tail, out, None, a.options, None
        ),
        "normalize": lambda out: _core.try_normalize(a.x, *given, a.beta, *tail, out, None, a.options),
        "batch_norm_backward": lambda out: _core.try_batch_norm_backward(
            tuple,
            a.dy,
            saved.x,
            table,
            a.gamma,
            *tail,
            needs,
            out,
            None,
            a.counts,
            0,
            saved.relu.data,
            True,
            None,
            1,
            0,
        ),
        "normalize_backward": lambda out: _core.try_normalize_backward(
            tuple, a.dy, a.x, *given, *tail, needs, out, None
        ),
        "update_running": lambda out: _core.try_update_running(a.mean, a.var, table, 0.1, 1, None, False),
    }


def check_ordinary_calls():
    """Let 50 allocations fail after each of the first: nothing but a MemoryError may leave C."""
    a = Arguments()
    for name, call in ordinary_calls(a).items():
        for out in (None, a.out):
            for count in (1, 50):
                before = a.out.tobytes()
                for n in range(40):
                    raised = raises(lambda call=call, out=out: call(out), n, count)
                    if raised and a.out.tobytes() != before:
                        print(f"{name} has changed out without memory")
                    a.out.fill(7)


def main():
    inplace = {name: WITHOUT_OUT[name] for name in ("batch_norm in place",)}
    calls = {}
    for name, run in {**WITH_OUT, **WITH_TWO_OUT, **inplace}.items():
        a = Arguments()
        outs = [{}]
        if name in WITH_OUT:
            outs += [{"out": a.out}, {"out": a.x}]
        if name in WITH_TWO_OUT:
            outs += [{"out": (a.out, a.out2)}]
        for out in outs:
            calls[name, *out, len(calls)] = (run, a, out)
            for _ in range(50):
                run(a, **out)
    kinds = ({}, {"update_rate": None}, {"ghost_size": 4}, {"activation": "relu"})
    layers = [bn.BatchNorm(6, **kind) for kind in kinds]
    x = Arguments().x
    for layer in layers:
        layer(x)
    plain, dy = layers[0], np.ones_like(x)
    steps = {
        "training": lambda: plain.train()(x, out=x),
        "backward": lambda: plain.backward(dy, out=dy),
        "evaluation": lambda: plain.eval()(x, out=x),
    }
    for step in steps.values():
        for _ in range(50):  # until Python knows its code: it unpacks a tuple by an iterator before
            plain(x)
            step()
    plain.train()(x)
    check_ordinary_calls()
    wrap_core()
    for (name, *_), (run, a, out) in calls.items():
        a.out.fill(7)
        a.out2.fill(7)
        before = written(a)
        if raises(lambda run=run, a=a, out=out: run(a, **out)) and written(a) != before:
            print(f"{name} wanted memory after it had written to out")
    for layer in layers:
        before = state_of(layer)
        if raises(lambda layer=layer: layer(x)) and state_of(layer) != before:
            print(f"{layer!r} has changed")
    for name, step in steps.items():
        plain.train()(x)
        FAILING.value = 0
        if raises(step):
            print(f"{name} of the layer wanted memory after it had written to out")
    print(f"{len(calls)} calls, {len(layers)} layers")


main()
