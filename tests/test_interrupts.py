"""A layer whose call is ended in its midst, as by a signal's handler: it is as before the call or as after it."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn
from batchnorm import layers

PACKAGE = str(Path(layers.__file__).parent)

try:
    import _testcapi  # of CPython's own tests, which not every Python comes with
except ImportError:
    _testcapi = None

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (7, 3, 2)).astype(np.float32)
DY = RNG.normal(size=X.shape).astype(np.float32)
NEXT = X * np.float32(2) + 1
ONE = X[:1, :, :1].copy()
MASK = np.arange(14).reshape(7, 2) % 3 > 0
IDS = np.array([0, 0, 1, 1, 1, 3, 3])


class Interrupted(BaseException):
    pass


def trained(**settings):
    layer = bn.BatchNorm(3, **settings)
    layer(X.copy(), **({"domain": 1} if layer.domains else {}))
    layer.backward(DY)
    return layer


def state_of(**settings):
    layer = trained(**settings)
    layer(NEXT, **({"domain": 1} if layer.domains else {}))
    return layer.state_dict() | {"gamma": np.full(3, 5, np.float32), "beta": np.full(3, 6, np.float32)}


def is_interrupted(call, n):
    """Run `call`, with an exception before the n-th instruction of the layers; tell whether it came to that."""
    left = n

    def trace(frame, event, _):
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        left -= event == "opcode"
        if left == 0:
            raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return False


def shown(layer):
    """Give all that the layer shows, and what backward does next."""
    results = [layer.dgamma, layer.dbeta, layer.dresidual]
    shows = [None if a is None else a.tobytes() for a in (*results, *layer.state_dict().values())]
    shows += [layer.training, repr(layer), str(layer.report())]
    for dy in (DY, DY[:1, :, :1].copy()):
        try:
            dx = layer.backward(dy)
        except RuntimeError:
            return shows, "no backward"
        except ValueError:  # of a call with ONE
            continue
        after = [None if a is None else a.tobytes() for a in (dx, layer.dgamma, layer.dbeta, layer.dresidual)]
        return shows, after
    raise AssertionError


def in_place(layer):
    x = NEXT.copy()
    layer(x, out=x)


def evaluated(layer):
    layer.eval()(X)
    layer.train()


STATE, POOLED, DOMAINS = state_of(), state_of(update_rate=None), state_of(domains=2)
RENORM = bn.RenormSchedule.constant(3, 5)

# name -> settings, what is done before, what is interrupted
CALLS = {
    "train": ({}, None, lambda a: a(NEXT)),
    "train_with_out": ({}, None, lambda a: a(NEXT, out=np.empty_like(X))),
    "train_in_place": ({}, None, in_place),
    "train_after_evaluation": ({}, evaluated, lambda a: a(NEXT)),
    "evaluate": ({}, lambda a: a.eval(), lambda a: a(NEXT)),
    "pooled": ({"update_rate": None}, None, lambda a: a(NEXT)),
    "debiased": ({"debias": True}, None, lambda a: a(NEXT)),
    "masked": ({}, None, lambda a: a(NEXT, mask=MASK)),
    "running": ({}, None, lambda a: a(NEXT, use_stats="running", update_stats=True)),
    "again": ({}, None, lambda a: a(NEXT, update_stats=False)),
    "skipped": ({"nonfinite": "skip"}, None, lambda a: a(NEXT * np.float32(np.inf))),
    "domains": ({"domains": 2}, None, lambda a: a(NEXT, domain=1)),
    "ghosts": ({"ghost_size": 3}, None, lambda a: a(NEXT)),
    "renorm": ({"renorm": RENORM}, None, lambda a: a(NEXT)),
    "relu": ({"activation": "relu"}, None, lambda a: a(NEXT, residual=X)),
    "segments": ({}, None, lambda a: a(NEXT, segments=IDS)),
    "segments_with_out": ({}, None, lambda a: a(NEXT, segments=IDS, out=np.empty_like(X))),
    "masked_relu": ({"activation": "relu"}, None, lambda a: a(NEXT, residual=X, mask=MASK)),
    "masked_ghosts": ({"ghost_size": 4, "debias": True}, None, lambda a: a(NEXT, mask=MASK)),
    "renorm_of_ghosts": ({"ghost_size": 4, "renorm": RENORM}, None, lambda a: a(NEXT, out=np.empty_like(X))),
    "kept_y": ({}, None, lambda a: a(NEXT, keep="y")),
    "one_value": ({"single_value": "use_running"}, None, lambda a: a(ONE)),
    "one_value_skipped": ({"single_value": "skip"}, None, lambda a: a(ONE)),
    "backward": ({}, lambda a: a(NEXT), lambda a: a.backward(DY)),
    "backward_of_evaluation": ({}, lambda a: a.eval()(NEXT), lambda a: a.backward(DY)),
    "backward_relu": ({"activation": "relu"}, lambda a: a(NEXT, residual=X), lambda a: a.backward(DY)),
    "load": ({}, None, lambda a: a.load_state_dict(STATE)),
    "load_pooled": ({"update_rate": None}, None, lambda a: a.load_state_dict(POOLED)),
    "load_domains": ({"domains": 2}, None, lambda a: a.load_state_dict(DOMAINS)),
    "reset": ({}, None, lambda a: a.reset_statistics()),
    "freeze": ({}, None, lambda a: a.freeze()),
    "assign": ({}, None, lambda a: setattr(a, "gamma", np.full(3, 4, np.float32))),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_call_leaves_all_old_or_all_new(name):
    settings, prepare, call = CALLS[name]

    def prepared():
        layer = trained(**settings)
        if prepare is not None:
            prepare(layer)
        return layer

    def done():
        layer = prepared()
        with np.errstate(all="ignore"):
            call(layer)
        return layer

    old, new = shown(prepared()), shown(done())
    seen, n = [], 0
    while True:
        n += 1
        layer = prepared()
        if not is_interrupted(lambda layer=layer: call(layer), n):
            break
        seen.append(shown(layer))
    assert n > 10
    assert all(one in (old, new) for one in seen)
    assert seen[0] == old
    assert seen[-1] == new


def test_an_interrupted_backward_into_x_is_done_or_leaves_x_whole_or_no_backward():
    def prepared():
        layer = trained()
        x = NEXT.copy()
        layer(x)
        return layer, x

    layer, x = prepared()
    old = shown(layer)
    layer, x = prepared()
    layer.backward(DY, out=x)
    new, written, n = shown(layer), x.tobytes(), 0
    while True:
        n += 1
        layer, x = prepared()
        if not is_interrupted(lambda layer=layer, x=x: layer.backward(DY, out=x), n):
            break
        after = shown(layer)
        assert after in (old, new, (old[0], "no backward"))
        assert after[1] == "no backward" or x.tobytes() != written
    assert n > 10


def test_a_refused_backward_into_x_can_be_put_right():
    layer, x = trained(), NEXT.copy()
    layer(x)
    with pytest.raises(ValueError, match="dy must have shape"):
        layer.backward(DY[:2], out=x)
    assert layer.backward(DY, out=x) is x


# ---- no memory ---------------------------------------------------------------------------------------------

# name -> settings, what is to be done without writing to out or changing the layer where an object cannot be made
WRITING = {
    "train": ({}, lambda layer, out: layer(NEXT, out=out)),
    "train_debiased": ({"debias": True}, lambda layer, out: layer(NEXT, out=out)),
    "train_strided": ({}, lambda layer, out: layer(np.repeat(NEXT, 2, 2)[:, :, ::2], out=out)),
    "train_masked": ({}, lambda layer, out: layer(NEXT, mask=MASK, out=out)),
    "train_domains": ({"domains": 2}, lambda layer, out: layer(NEXT, domain=1, out=out)),
    "train_relu": ({"activation": "relu"}, lambda layer, out: layer(NEXT, residual=X, out=out)),
    "train_pooled": ({"update_rate": None}, lambda layer, out: layer(NEXT, out=out)),
    "train_pooled_ghosts": (
        {"update_rate": None, "ghost_size": 3},
        lambda layer, out: layer(NEXT, out=out),
    ),
    "train_ghosts": ({"ghost_size": 3}, lambda layer, out: layer(NEXT, out=out)),
    "train_debiased_ghosts": ({"ghost_size": 4, "debias": True}, lambda layer, out: layer(NEXT, out=out)),
    "train_segments": ({}, lambda layer, out: layer(NEXT, segments=IDS, out=out)),
    "train_renorm": ({"renorm": RENORM}, lambda layer, out: layer(NEXT, out=out)),
    "train_importance": (
        {"update_rate": None, "weights_are": "importance"},
        lambda layer, out: layer(NEXT, weights=MASK * 0.7, out=out),
    ),
    "again": ({}, lambda layer, out: layer(NEXT, update_stats=False, out=out)),
    "running": ({}, lambda layer, out: layer(NEXT, use_stats="running", update_stats=True, out=out)),
    "evaluate": ({}, lambda layer, out: layer(NEXT, use_stats="running", update_stats=False, out=out)),
    "backward": ({}, lambda layer, out: layer.backward(DY, out=out)),
}


if _testcapi is not None:

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of generators that are ended
    @pytest.mark.parametrize("name", WRITING)
    def test_no_memory_for_the_nth_object_leaves_out_and_layer_alone(name):
        settings, call = WRITING[name]
        call(trained(**settings), np.empty_like(X))  # which imports and remembers what the first call does
        old, n, done = shown(trained(**settings)), 0, 0
        while done < 3:
            layer, out, failed = trained(**settings), np.full_like(X, 9), False
            _testcapi.set_nomemory(n, n + 1)
            try:
                call(layer, out)
            except (MemoryError, SystemError):  # the latter from NumPy, which forgets to say why it gives up
                failed = True
            finally:
                _testcapi.remove_mem_hooks()
            if failed:
                assert (out == 9).all(), n
                assert shown(layer) == old
            done, n = 0 if failed else done + 1, n + 1
        assert n > 5


# ---- warnings that are errors ------------------------------------------------------------------------------

FUNCTIONS = {
    "batch_norm": lambda x, g, b, out: bn.batch_norm(x, g, b, out=out),
    "masked": lambda x, g, b, out: bn.batch_norm(x, g, b, mask=np.arange(8) % 4 > 0, out=out),
    "weighted": lambda x, g, b, out: bn.batch_norm(x, g, b, weights=np.arange(8) / 3, out=out),
    "segments": lambda x, g, b, out: bn.batch_norm(x, g, b, segments=np.arange(8) // 3, out=out),
    "normalize": lambda x, g, b, out: bn.normalize(x, b, np.abs(g), g, b, out=out),
    "ghosts": lambda x, g, b, out: bn.batch_norm(x, g, b, ghost_size=4, out=out),
    "renorm": lambda x, g, b, out: bn.batch_norm(x, g, b, renorm=bn.Renorm(b, np.abs(g), 3, 5), out=out),
    "relu": lambda x, g, b, out: bn.batch_norm(x, g, b, residual=x.copy(), out=out, activation="relu"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("special", [np.inf, np.nan, 1e300, 1e-300])
def test_no_value_makes_a_function_warn_once_it_has_written(name, special):
    with np.errstate(all="ignore"):
        for dtype in (np.float16, np.float32, np.float64):
            x = np.random.default_rng(0).normal(size=(8, 3)).astype(dtype)
            gamma = np.array([1, special, 2]).astype(dtype)
            beta = np.array([special, 1, 2]).astype(dtype)
            x[2, 1] = special
            with warnings.catch_warnings(), np.errstate(all="raise"):
                warnings.simplefilter("error")
                y = FUNCTIONS[name](x, gamma, beta, np.empty_like(x))
                same = x.copy()
                FUNCTIONS[name](same, gamma, beta, same)
            y = y[0] if isinstance(y, tuple) else y
            assert y.tobytes() == same.tobytes()
