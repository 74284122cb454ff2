"""State files: what is saved comes back bit for bit, a save is all or nothing, and no file can do harm.

The hostile files are built here, from the bytes up. Each must be refused with a ValueError that says what was
wrong, change nothing in the layer that tried to load it, and cost no more memory than a good file would.
"""

import errno
import inspect
import io
import json
import math
import os
import pickle
import re
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batchnorm as bn

C = 3
ARRAYS = {
    "gamma": np.array([1.5, -0.0, 3e38], np.float32),
    "beta": np.array([1e-45, -2.0, 0.1], np.float32),
    "running_mean": np.array([-0.0, 5e-324, 1 / 3]),
    "running_var": np.array([0.0, 1e300, 2 / 3]),
    "update_count": np.array(2**40 + 1, np.int64),
}
SETTINGS = bn.BatchNorm(C).state_dict()["settings"]
STATE = ARRAYS | {"settings": SETTINGS}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def layer_with_state(**settings):
    layer = bn.BatchNorm(C, **settings)
    state = layer.state_dict()
    layer.load_state_dict(state | {name: value for name, value in ARRAYS.items() if name in state})
    return layer


def pooled_layer():
    layer = bn.BatchNorm(C, update_rate=None)
    for seed in range(3):
        layer(np.random.default_rng(seed).normal(1e3, 2, (5, C, 4)))
    return layer


def snapshot(layer):
    return {name: (value.dtype, value.shape, value.tobytes()) for name, value in layer.state_dict().items()}


# ---- good files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        layer_with_state,
        pooled_layer,
        lambda: bn.BatchNorm(C, dtype=np.float16),
        lambda: bn.BatchNorm(C, dtype=np.float64, gamma=False),
        lambda: bn.BatchNorm(C, gamma=False, beta=False),
        lambda: bn.BatchNorm(0, update_rate=None),
        lambda: bn.BatchNorm(100_000),
    ],
    ids=["extreme_values", "pooled", "float16", "no_gamma", "no_parameters", "no_channels", "many_channels"],
)
def test_a_saved_state_comes_back_bit_for_bit(build, tmp_path):
    layer = build()
    layer.save(tmp_path / "layer.npz")
    other = eval(repr(layer), {"BatchNorm": bn.BatchNorm})
    other.load(tmp_path / "layer.npz")
    assert snapshot(other) == snapshot(layer)


def test_training_resumed_from_a_file_gives_the_same_bits(tmp_path):
    layer, resumed = pooled_layer(), bn.BatchNorm(C, update_rate=None)
    layer.save(tmp_path / "layer.npz")
    resumed.load(tmp_path / "layer.npz")
    x = np.random.default_rng(9).normal(1e3, 2, (5, C))
    assert same_bits(layer(x), resumed(x))
    assert snapshot(layer) == snapshot(resumed)


def test_numpy_reads_a_state_file_without_pickle(tmp_path):
    layer = layer_with_state()
    layer.save(tmp_path / "layer.npz")
    with np.load(tmp_path / "layer.npz", allow_pickle=False) as file:
        assert int(file["format_version"]) == 1
        assert all(same_bits(file[name], value) for name, value in layer.state_dict().items())


def test_a_file_that_numpy_wrote_from_a_state_can_be_loaded(tmp_path):
    np.savez(tmp_path / "layer.npz", format_version=np.int64(1), **STATE)
    layer = bn.BatchNorm(C)
    layer.load(tmp_path / "layer.npz")
    assert all(same_bits(value, STATE[name]) for name, value in layer.state_dict().items())


def test_a_file_of_the_first_format_loads_forever(tmp_path):
    # Written out in full: whatever becomes of the writer, these bytes must be read.
    def npy(descr, shape, data):
        header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
        return b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(117).encode() + b"\n" + data

    settings = (
        '{"channels": 2, "axis": 1, "eps": 1e-05, "update_rate": 0.1, "ddof": 1, "gamma": true, "beta": true, '
        '"dtype": "float32", "debias": false, "domains": null, "ghost_size": null, "renorm": null, "parity": null, '
        '"activation": null}'
    )
    members = {
        "format_version": npy("<i8", "()", struct.pack("<q", 1)),
        "gamma": npy("<f4", "(2,)", struct.pack("<2f", 0.5, -2)),
        "beta": npy("<f4", "(2,)", struct.pack("<2f", 0.25, 4)),
        "running_mean": npy("<f8", "(2,)", struct.pack("<2d", 0.1, -3)),
        "running_var": npy("<f8", "(2,)", struct.pack("<2d", 0.2, 5)),
        "update_count": npy("<i8", "()", struct.pack("<q", 12)),
        "settings": npy(f"<U{len(settings)}", "()", settings.encode("utf-32-le")),
    }
    (tmp_path / "layer.npz").write_bytes(zip_of({f"{name}.npy": data for name, data in members.items()}))
    layer = bn.BatchNorm(2)
    layer.load(tmp_path / "layer.npz")
    state = layer.state_dict()
    assert [(name, value.tolist()) for name, value in state.items() if name != "settings"] == [
        ("gamma", [0.5, -2]),
        ("beta", [0.25, 4]),
        ("running_mean", [0.1, -3]),
        ("running_var", [0.2, 5]),
        ("update_count", 12),
    ]


def test_equal_states_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        layer_with_state().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_loading_keeps_gradients_and_mode(tmp_path):
    layer = layer_with_state().eval()
    layer(np.ones((4, C)))
    layer.backward(np.ones((4, C)))
    layer.save(tmp_path / "layer.npz")
    dbeta = layer.dbeta
    layer.load(tmp_path / "layer.npz")
    assert (layer.training, layer.dbeta is dbeta) == (False, True)


# ---- paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Path, str, os.fsencode], ids=["path", "str", "bytes"])
def test_the_path_is_used_as_it_is(kind, tmp_path):
    layer_with_state().save(kind(tmp_path / "no suffix é"))
    bn.BatchNorm(C).load(kind(tmp_path / "no suffix é"))
    assert [p.name for p in tmp_path.iterdir()] == ["no suffix é"]


def test_a_symbolic_link_is_followed_and_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    layer_with_state().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    bn.BatchNorm(C).load(tmp_path / "target")


@pytest.mark.parametrize("relative", [True, False])
def test_a_link_to_a_link_to_no_file_yet_makes_that_file(relative, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner").symlink_to("target" if relative else tmp_path / "folder" / "target")
    (tmp_path / "link").symlink_to("folder/inner" if relative else tmp_path / "folder" / "inner")
    layer_with_state().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["inner", "target"]
    bn.BatchNorm(C).load(tmp_path / "folder" / "target")


@pytest.mark.parametrize("method", ["save", "load"])
def test_a_loop_of_links_is_an_os_error_and_stays(method, tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError) as caught:
        getattr(bn.BatchNorm(C), method)(tmp_path / "a")
    assert caught.value.errno == errno.ELOOP
    assert [(p.name, p.is_symlink()) for p in sorted(tmp_path.iterdir())] == [("a", True), ("b", True)]


def test_all_names_of_a_file_get_the_new_state(tmp_path):
    bn.BatchNorm(100_000).save(tmp_path / "layer.npz")  # a larger one: its rest must go
    (tmp_path / "other").hardlink_to(tmp_path / "layer.npz")
    layer_with_state().save(tmp_path / "layer.npz")
    layer_with_state().save(tmp_path / "alone")
    assert (tmp_path / "other").samefile(tmp_path / "layer.npz")
    assert (tmp_path / "other").read_bytes() == (tmp_path / "alone").read_bytes()


# ---- permissions ------------------------------------------------------------------------------------------

posix_only = pytest.mark.skipif(os.name != "posix", reason="has no such permissions")


@pytest.fixture
def umask():
    """Set the umask of the process until the test ends."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


@posix_only
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o644])
@pytest.mark.parametrize("through", ["file", "symbolic_link", "hard_link"])
def test_a_file_that_is_saved_again_keeps_its_permissions(mode, through, tmp_path, umask):
    umask(0o022)
    bn.BatchNorm(C).save(tmp_path / "layer.npz")
    (tmp_path / "layer.npz").chmod(mode)
    (tmp_path / "symbolic_link").symlink_to("layer.npz")
    if through == "hard_link":
        (tmp_path / "hard_link").hardlink_to(tmp_path / "layer.npz")
    layer_with_state().save(tmp_path / ("layer.npz" if through == "file" else through))
    assert permissions(tmp_path / "layer.npz") == mode


@posix_only
def test_a_private_file_is_private_while_it_is_written_anew(tmp_path, umask, monkeypatch):
    umask(0o022)
    bn.BatchNorm(C).save(tmp_path / "layer.npz")
    (tmp_path / "layer.npz").chmod(0o600)
    seen, chown = [], os.chown

    def noted(path, *owner):
        seen.append(permissions(Path(path)))
        chown(path, *owner)

    monkeypatch.setattr(os, "chown", noted)
    layer_with_state().save(tmp_path / "layer.npz")
    assert seen == [0o600]


@posix_only
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_permissions_of_the_umask(mask, mode, tmp_path, umask):
    umask(mask)
    bn.BatchNorm(C).save(tmp_path / "layer.npz")
    assert permissions(tmp_path / "layer.npz") == mode


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root may give files away")
def test_a_file_that_root_saves_again_keeps_its_owner(tmp_path):
    bn.BatchNorm(C).save(tmp_path / "layer.npz")
    os.chown(tmp_path / "layer.npz", 12345, 23456)
    layer_with_state().save(tmp_path / "layer.npz")
    status = (tmp_path / "layer.npz").stat()
    assert (status.st_uid, status.st_gid) == (12345, 23456)


@posix_only
@pytest.mark.parametrize(("mode", "left"), [(0o640, 0o600), (0o664, 0o644), (0o600, 0o600)])
def test_what_a_group_may_is_not_given_to_another(mode, left, tmp_path, monkeypatch):
    bn.BatchNorm(C).save(tmp_path / "layer.npz")
    (tmp_path / "layer.npz").chmod(mode)
    monkeypatch.setattr(os, "chown", not_permitted)
    layer_with_state().save(tmp_path / "layer.npz")
    assert permissions(tmp_path / "layer.npz") == left


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write to everything")
def test_a_file_that_may_not_be_written_is_an_os_error(tmp_path):
    bn.BatchNorm(C).save(tmp_path / "layer.npz")
    before = (tmp_path / "layer.npz").read_bytes()
    (tmp_path / "layer.npz").chmod(0o444)
    with pytest.raises(PermissionError):
        layer_with_state().save(tmp_path / "layer.npz")
    assert (tmp_path / "layer.npz").read_bytes() == before


# ---- what is no file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["save", "load"])
def test_a_path_of_another_type_is_refused(method):
    with pytest.raises(TypeError, match=r"^path must be a str or os.PathLike, got int$"):
        getattr(bn.BatchNorm(C), method)(3)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        bn.BatchNorm(C).load(tmp_path / "missing.npz")


def test_a_directory_is_an_os_error(tmp_path):
    for method in ("save", "load"):
        with pytest.raises(OSError):
            getattr(bn.BatchNorm(C), method)(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"^file must be a regular file, got p"):
        bn.BatchNorm(C).load(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_even_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("was opened"))
    for method in ("save", "load"):
        with pytest.raises(ValueError):
            getattr(bn.BatchNorm(C), method)(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("through", ["itself", "link"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_and_a_device_are_not_replaced(kind, through, tmp_path):
    mode = {"pipe": stat.S_IFIFO, "device": stat.S_IFCHR}[kind]
    try:  # a device of one's own: where the test fails, it is replaced
        os.mknod(tmp_path / "itself", mode | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root may make devices")
    (tmp_path / "link").symlink_to("itself")
    before = (tmp_path / "itself").stat()
    text = rf"^path must be that of a regular file or of none, got {kind[0].replace('d', 'c')}rw-------$"
    with pytest.raises(ValueError, match=text):
        bn.BatchNorm(C).save(tmp_path / through)
    assert (tmp_path / "itself").stat() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["itself", "link"]


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero here")
def test_an_endless_device_is_refused():
    with pytest.raises(ValueError, match=r"^file must be a regular file, got c"):
        bn.BatchNorm(C).load("/dev/zero")


# ---- saving is all or nothing -----------------------------------------------------------------------------


def not_permitted(*_):
    raise PermissionError(1, "Operation not permitted")


def no_space(*_):
    raise OSError(28, "No space left on device")


def interrupted(*_):
    raise KeyboardInterrupt


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("failure", [no_space, interrupted])
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", [True, False])
def test_a_save_that_fails_leaves_the_old_file_and_no_other(step, failure, old, tmp_path, monkeypatch):
    if old:
        bn.BatchNorm(C).save(tmp_path / "layer.npz")
    before = files(tmp_path)
    monkeypatch.setattr(os, step, failure)
    with pytest.raises((OSError, KeyboardInterrupt)):
        layer_with_state().save(tmp_path / "layer.npz")
    assert files(tmp_path) == before


@pytest.mark.parametrize("failure", [no_space, interrupted])
@pytest.mark.parametrize("channels", [1, C, 1000])
def test_a_save_in_place_that_fails_puts_the_old_bytes_back(channels, failure, tmp_path, monkeypatch):
    bn.BatchNorm(channels).save(tmp_path / "layer.npz")
    (tmp_path / "other").hardlink_to(tmp_path / "layer.npz")
    before = files(tmp_path)
    monkeypatch.setattr(os, "fsync", failure)  # when all new bytes are there
    with pytest.raises((OSError, KeyboardInterrupt)):
        layer_with_state().save(tmp_path / "layer.npz")
    assert files(tmp_path) == before
    assert (tmp_path / "other").samefile(tmp_path / "layer.npz")


@posix_only
@pytest.mark.parametrize("names", [1, 2])
def test_a_saved_file_is_on_the_disk_before_its_name_is(names, tmp_path, monkeypatch):
    bn.BatchNorm(C).save(tmp_path / "layer.npz")
    if names == 2:
        (tmp_path / "other").hardlink_to(tmp_path / "layer.npz")
    fsync, synced = os.fsync, []

    def noted(descriptor):
        synced.append(stat.S_IFMT(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    layer_with_state().save(tmp_path / "layer.npz")
    assert synced == ([stat.S_IFREG, stat.S_IFDIR] if names == 1 else [stat.S_IFREG])


@posix_only
@pytest.mark.parametrize("old", ["none", "one_name", "two_names"])
@pytest.mark.parametrize("room", [0, 100, 20_000])
def test_a_file_that_finds_no_room_leaves_the_old_one_and_no_other(old, room, tmp_path):
    # A limit of the system on the size of files: writing stops in the middle, as on a disk that is full.
    if old != "none":
        bn.BatchNorm(1000).save(tmp_path / "layer.npz")
    if old == "two_names":
        (tmp_path / "other").hardlink_to(tmp_path / "layer.npz")
    before = files(tmp_path)
    program = (
        "import resource, sys, batchnorm\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    batchnorm.BatchNorm(1000, ddof=0).save(sys.argv[1])\n"
        "except OSError as error:\n"
        "    sys.exit(error.errno)\n"
    )
    process = subprocess.run([sys.executable, "-c", program, tmp_path / "layer.npz"], timeout=60, check=False)
    assert process.returncode == errno.EFBIG
    assert files(tmp_path) == before


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_killed_save_leaves_the_old_file(step, tmp_path):
    layer_with_state().save(tmp_path / "layer.npz")
    before = (tmp_path / "layer.npz").read_bytes()
    program = (
        "import os, signal, sys, batchnorm\n"
        f"os.{step} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"batchnorm.BatchNorm({C}).save(sys.argv[1])\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, tmp_path / "layer.npz"], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "layer.npz").read_bytes() == before


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    layer = layer_with_state()
    layer.save(tmp_path / "layer.npz")
    before = (tmp_path / "layer.npz").read_bytes()
    layer.gamma[1] = np.nan
    with pytest.raises(ValueError, match=r"^gamma must be finite, got nan in channel 1$"):
        layer.save(tmp_path / "layer.npz")
    assert (tmp_path / "layer.npz").read_bytes() == before


# ---- hostile files ----------------------------------------------------------------------------------------


def npy(array, version=(1, 0)):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asanyarray(array), version=version)
    return buffer.getvalue()


def npy_with_header(header, data, version=b"\x01\x00", length=None):
    header = header if isinstance(header, bytes) else header.encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(header) if length is None else length) + header + data


def members(**changes):
    """Give the .npy members of a good state, with some changed; None leaves one out."""
    contents = {"format_version": npy(np.int64(1))} | {name: npy(value) for name, value in STATE.items()}
    contents |= changes
    return {f"{name}.npy": content for name, content in contents.items() if content is not None}


def zip_of(contents, compression=zipfile.ZIP_STORED, extra=(), comment=b""):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in [*contents.items(), *extra]:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
        archive.comment = comment
    return buffer.getvalue()


def good():
    return zip_of(members())


def with_name(name):
    """Give gamma.npy another name in a good file, as raw bytes: zipfile would repair some of them."""
    placeholder = "x" * len(name)
    contents = {placeholder if key == "gamma.npy" else key: value for key, value in members().items()}
    return zip_of(contents).replace(placeholder.encode(), name)


def duplicated():
    # zipfile warns of a name it has written before: give it another one, and change that in the bytes.
    return zip_of(members(), extra=[("gamma.npx", npy(np.zeros(C, np.float32)))]).replace(b"gamma.npx", b"gamma.npy")


def patched(at, fmt, value, record):
    """Change one field of a good file in the `record`: of gamma.npy, or the end record."""
    raw = bytearray(good())
    begin = {
        "local": raw.index(b"gamma.npy") - 30,
        "directory": raw.rindex(b"gamma.npy") - 46,
        "end": len(raw) - 22,
    }[record]
    struct.pack_into(fmt, raw, begin + at, value)
    return bytes(raw)


def with_gap():
    """Put a byte between the last member and the directory, with all offsets right."""
    raw = good()
    start = struct.unpack_from("<I", raw, len(raw) - 6)[0]
    return raw[:start] + b"?" + raw[start:-6] + struct.pack("<IH", start + 1, 0)


def with_data_changed():
    raw = bytearray(good())
    at = raw.index(STATE["gamma"].tobytes())
    raw[at] ^= 1
    return bytes(raw)


def with_zip64_end():
    """Put a zip64 end record before the usual one, which claims a directory of 2**60 bytes."""
    raw = good()
    end = len(raw) - 22
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 6, 6, 2**60, 0)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    return raw[:end] + record + locator + raw[end:]


def overlapping():
    """Two directory records for one local header: a "better zip bomb"."""
    raw = bytearray(good())
    struct.pack_into("<I", raw, raw.rindex(b"beta.npy") - 46 + 42, raw.index(b"gamma.npy") - 30)
    return bytes(raw)


def running_into_the_directory():
    """Let the last member go on for 10 bytes of the directory, with sizes and checksum that agree."""
    raw = bytearray(good())
    local, directory = raw.index(b"settings.npy") - 30, raw.rindex(b"settings.npy") - 46
    begin, size = local + 30 + len(b"settings.npy"), len(npy(STATE["settings"])) + 10
    for _ in range(2):  # once more, where the record itself lies in those 10 bytes
        fields = struct.pack("<3I", zlib.crc32(raw[begin : begin + size]), size, size)
        raw[local + 14 : local + 26] = raw[directory + 16 : directory + 28] = fields
    return bytes(raw)


def with_record_uncounted():
    raw = bytearray(good())
    struct.pack_into("<2H", raw, len(raw) - 14, 5, 5)
    return bytes(raw)


def encrypted():
    raw = bytearray(patched(6, "<H", 1, "local"))
    struct.pack_into("<H", raw, raw.rindex(b"gamma.npy") - 46 + 8, 1)
    return bytes(raw)


class Exploit:
    """What a pickle would run: it leaves a file behind."""

    def __reduce__(self):
        return (open, (os.environ["BATCHNORM_TEST_EXPLOIT"], "w"))


def object_array():
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([Exploit()] * C, object), allow_pickle=True)
    return buffer.getvalue()


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("gamma.npy"))
    return buffer.getvalue()


F4 = STATE["gamma"].tobytes()
HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }\n"
BOMB = b"\0" * 50_000_000
BIG = {"shape_4_tib": "(1099511627776,)", "shape_exabytes": "(9223372036854775807,)"}


def gamma(content):
    return lambda: zip_of(members(gamma=content))


def settings(text):
    return lambda: zip_of(members(settings=npy(text)))


def raw_settings(descr, data):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': (), }}\n"
    return lambda: zip_of(members(settings=npy_with_header(header, data)))


HOSTILE = {
    # Not a zip file, or not a whole one.
    "empty_file": (lambda: b"", "file must be a whole .npz file without a comment, got 0 bytes"),
    "text": (lambda: b"gamma: [1, 2, 3]\n" * 10, "file must be a whole .npz file"),
    "pickle": (lambda: pickle.dumps({"gamma": [1, 2, 3]}), "file must be a whole .npz file"),
    "bare_npy": (lambda: npy(STATE["gamma"]), "file must be a whole .npz file"),
    "tar": (tar, "file must be a whole .npz file"),
    "first_half": (lambda: good()[: len(good()) // 2], "file must be a whole .npz file"),
    "last_half": (lambda: good()[len(good()) // 2 :], "file must be a whole .npz file"),
    "one_byte_short": (lambda: good()[:-1], "file must be a whole .npz file"),
    "one_byte_more": (lambda: good() + b"\0", "file must be a whole .npz file"),
    "comment": (lambda: zip_of(members(), comment=b"hello"), "file must be a whole .npz file"),
    "program_in_front": (lambda: b"#!/bin/sh\nexit\n" + good(), "file must be a whole .npz file"),
    "zip_in_front": (lambda: good() + good(), "zip directory must end at byte"),
    "empty_zip": (lambda: zip_of({}), "file must have a member 'format_version.npy', got no members"),
    "many_disks": (lambda: patched(4, "<H", 7, "end"), "zip end record must describe one whole file"),
    "record_uncounted": (with_record_uncounted, "zip directory must have 5 records, got 120 bytes more"),
    "record_missing": (
        lambda: patched(8, "<I", 0x10001 * (len(members()) + 1), "end"),
        "zip directory must hold its records, got 0 bytes for one",
    ),
    "counts_disagree": (lambda: patched(8, "<H", 3, "end"), "zip end record must describe one whole file"),
    "many_members": (
        lambda: zip_of({f"{i}.npy": b"" for i in range(65)}),
        "file must have at most 64 members, got 65",
    ),
    "zip64_end": (with_zip64_end, "zip directory must end at byte"),
    "directory_too_long": (lambda: patched(12, "<I", 2**32 - 1, "end"), "zip directory must end at byte"),
    "directory_elsewhere": (lambda: patched(16, "<I", 0, "end"), "zip directory must end at byte"),
    "too_large": (
        lambda: b"PK" + b"\0" * 200_000,
        f"file must have at most {65616 + SETTINGS.nbytes} bytes for this state, got 200002",
    ),
    "bytes_between": (
        with_gap,
        "file must have nothing between its members and their directory, got 1 bytes",
    ),
    # Members that are not the ones.
    "no_gamma": (
        lambda: zip_of(members(gamma=None)),
        "file must have the members format_version.npy, gamma.npy",
    ),
    "no_version": (
        lambda: zip_of(members(format_version=None)),
        "file must have a member 'format_version.npy'",
    ),
    "one_more_array": (
        lambda: zip_of(members(delta=npy(1.0))),
        "file must have the members format_version.npy",
    ),
    "one_more_file": (
        lambda: zip_of(members(), extra=[("readme.txt", "hello")]),
        "file must have the members format_version.npy",
    ),
    "one_more_folder": (
        lambda: zip_of(members(), extra=[("folder/", "")]),
        "file must have the members format_",
    ),
    "duplicate": (duplicated, "member 'gamma.npy' must be there once, got a second one"),
    "parent_folder": (lambda: with_name(b"../gamma.npy"), "file must have the members format_version.npy"),
    "absolute_name": (lambda: with_name(b"/etc/gamma.npy"), "file must have the members format_version.npy"),
    "backslash": (lambda: with_name(b"..\\gamma.npy"), "file must have the members format_version.npy"),
    "null_in_name": (lambda: with_name(b"gamma.npy\0.npy"), "file must have the members format_version.npy"),
    "other_case": (lambda: with_name(b"Gamma.npy"), "file must have the members format_version.npy"),
    "no_suffix": (lambda: with_name(b"gamma"), "file must have the members format_version.npy"),
    "latin_name": (lambda: with_name(b"g\xe4mma.npy"), "file must have the members format_version.npy"),
    # Members that are not stored as they are.
    "deflated": (
        lambda: zip_of(members(), zipfile.ZIP_DEFLATED),
        "member 'format_version.npy' must be stored as it is, got method 8",
    ),
    "bomb": (
        lambda: zip_of(members(gamma=npy_with_header(HEADER, BOMB)), zipfile.ZIP_DEFLATED),
        "member 'format_version.npy' must be stored as it is, got method 8",
    ),
    "bzip2": (
        lambda: zip_of(members(), zipfile.ZIP_BZIP2),
        "member 'format_version.npy' must be stored as it is",
    ),
    "lzma": (
        lambda: zip_of(members(), zipfile.ZIP_LZMA),
        "member 'format_version.npy' must be stored as it is",
    ),
    "encrypted": (encrypted, "member 'gamma.npy' must be stored as it is, got method 0, flags 1"),
    "streamed": (
        lambda: patched(8, "<H", 8, "directory"),
        "member 'gamma.npy' must be stored as it is, got method 0, flags 8",
    ),
    "sizes_disagree": (
        lambda: patched(24, "<I", 10**9, "directory"),
        "member 'gamma.npy' must be stored as it is",
    ),
    "larger_than_the_file": (
        lambda: patched(24, "<I", 10**6, "directory").replace(
            struct.pack("<2I", len(npy(STATE["gamma"])), 10**6), struct.pack("<2I", 10**6, 10**6)
        ),
        "member 'gamma.npy' must have a local header that agrees with the directory",
    ),
    "offset_outside": (
        lambda: patched(42, "<I", 2**31, "directory"),
        "member 'gamma.npy' must begin at byte",
    ),
    "overlapping": (overlapping, "member 'beta.npy' must begin at byte"),
    "into_the_directory": (running_into_the_directory, "member 'settings.npy' must end before byte"),
    "checksum": (with_data_changed, "member 'gamma.npy' must have the checksum 0x"),
    "names_disagree": (
        lambda: good().replace(b"gamma.npy", b"delta.npy", 1),
        "member 'gamma.npy' must have a local header that agrees with the directory, got another",
    ),
    "local_method": (
        lambda: patched(8, "<H", 8, "local"),
        "member 'gamma.npy' must have a local header that agrees",
    ),
    "local_size": (
        lambda: patched(22, "<I", 5, "local"),
        "member 'gamma.npy' must have a local header that agrees",
    ),
    "local_extra": (
        lambda: patched(28, "<H", 9, "local"),
        "member 'gamma.npy' must have a local header that agrees",
    ),
    "directory_extra": (lambda: patched(30, "<H", 9, "directory"), "zip directory must have plain records"),
    "directory_comment": (lambda: patched(32, "<H", 9, "directory"), "zip directory must have plain records"),
    "directory_magic": (lambda: patched(0, "<I", 0, "directory"), "zip directory must have plain records"),
    "name_too_long": (lambda: patched(28, "<H", 60000, "directory"), "zip directory must have plain records"),
    # Arrays that are not the ones.
    "not_npy": (gamma(b"hello"), "member 'gamma.npy' must begin as .npy format 1.0, got b'hello'"),
    "no_bytes": (gamma(b""), "member 'gamma.npy' must begin as .npy format 1.0, got b''"),
    "npy_2": (gamma(npy(STATE["gamma"], (2, 0))), "member 'gamma.npy' must begin as .npy format 1.0"),
    "npy_3": (gamma(npy(STATE["gamma"], (3, 0))), "member 'gamma.npy' must begin as .npy format 1.0"),
    "magic_only": (
        gamma(b"\x93NUMPY\x01\x00"),
        "member 'gamma.npy' must have the .npy header of a plain array",
    ),
    "header_too_long": (
        gamma(npy_with_header(HEADER, F4, length=60000)),
        "member 'gamma.npy' must have the .npy header of a plain array",
    ),
    "header_too_short": (
        gamma(npy_with_header(HEADER, F4, length=20)),
        "member 'gamma.npy' must have the .npy header of a plain array",
    ),
    "header_is_code": (
        gamma(npy_with_header("__import__('os').abort()\n", F4)),
        "member 'gamma.npy' must have the .npy header of a plain array",
    ),
    "header_is_nested": (
        gamma(npy_with_header("(" * 20000 + "\n", F4)),
        "member 'gamma.npy' must have the .npy header of a plain array",
    ),
    "header_has_more": (
        gamma(npy_with_header(HEADER + "0", F4)),
        "member 'gamma.npy' must have the .npy header of a plain array",
    ),
    "header_has_two_shapes": (
        gamma(npy_with_header(HEADER.replace(", }", ", 'shape': (9,), }"), F4)),
        "member 'gamma.npy' must have the .npy header of a plain array",
    ),
    "header_has_another_key": (
        gamma(npy_with_header(HEADER.replace(", }", ", 'extra': 0, }"), F4)),
        "member 'gamma.npy' must have the .npy header of a plain array",
    ),
    "header_is_not_ascii": (
        gamma(npy_with_header(HEADER.replace("3", "٣"), F4)),
        "member 'gamma.npy' must have the .npy header of a plain array",
    ),
    **{
        name: (
            gamma(npy_with_header(HEADER.replace("(3,)", shape), F4)),
            f"member 'gamma.npy' must have shape (3,), got {shape}",
        )
        for name, shape in BIG.items()
    },
    "shape_of_digits": (
        gamma(npy_with_header(HEADER.replace("3", "9" * 20000), F4)),
        "member 'gamma.npy' must have the .npy header of a plain array",
    ),
    "shape_negative": (
        gamma(npy_with_header(HEADER.replace("3", "-3"), F4)),
        "member 'gamma.npy' must have the .npy header of a plain array",
    ),
    "shape_shorter": (gamma(npy(STATE["gamma"][:2])), "member 'gamma.npy' must have shape (3,), got (2,)"),
    "shape_scalar": (gamma(npy(STATE["gamma"][0])), "member 'gamma.npy' must have shape (3,), got ()"),
    "shape_2d": (gamma(npy(STATE["gamma"][None])), "member 'gamma.npy' must have shape (3,), got (1, 3)"),
    "fortran_order": (
        gamma(npy_with_header(HEADER.replace("False", "True"), F4)),
        "member 'gamma.npy' must be in C order, got Fortran order",
    ),
    "object_dtype": (object_array, "member 'gamma.npy' must have dtype '<f4', got '|O'"),
    "structured_dtype": (
        gamma(npy(np.zeros(C, [("a", "<f4")]))),
        "member 'gamma.npy' must have the .npy header of a plain array",
    ),
    "big_endian": (
        gamma(npy(STATE["gamma"].astype(">f4"))),
        "member 'gamma.npy' must have dtype '<f4', got '>f4'",
    ),
    "wider_dtype": (gamma(npy(np.ones(C))), "member 'gamma.npy' must have dtype '<f4', got '<f8'"),
    "integer_dtype": (gamma(npy(np.ones(C, "<i4"))), "member 'gamma.npy' must have dtype '<f4', got '<i4'"),
    "text_dtype": (gamma(npy(np.array(["a"] * C))), "member 'gamma.npy' must have dtype '<f4', got '<U1'"),
    "time_dtype": (
        gamma(npy(np.zeros(C, "<M8[s]"))),
        "member 'gamma.npy' must have the .npy header of a plain array",
    ),
    "data_short": (
        gamma(npy_with_header(HEADER, F4[:-1])),
        "member 'gamma.npy' must have 12 bytes of data, got 11",
    ),
    "data_long": (
        gamma(npy_with_header(HEADER, F4 + b"\0")),
        "member 'gamma.npy' must have 12 bytes of data, got 13",
    ),
    "data_missing": (
        gamma(npy_with_header(HEADER, b"")),
        "member 'gamma.npy' must have 12 bytes of data, got 0",
    ),
    # Settings that are not the ones.
    "settings_of_bytes": (
        settings(np.array(b"{}")),
        "member 'settings.npy' must be one text of 4 bytes a character, got",
    ),
    "settings_of_two_texts": (
        settings(np.array(["{}", "{}"])),
        "member 'settings.npy' must be one text of 4 bytes",
    ),
    "settings_cut": (
        raw_settings(SETTINGS.dtype.str, SETTINGS.tobytes()[:-1]),
        "member 'settings.npy' must be one text of",
    ),
    "settings_longer": (
        raw_settings(SETTINGS.dtype.str, SETTINGS.tobytes() + b"\0"),
        "member 'settings.npy' must be one",
    ),
    "settings_of_big_endian": (
        raw_settings(f">{SETTINGS.dtype.str[1:]}", SETTINGS.tobytes()),
        "member 'settings.npy' must be",
    ),
    "settings_of_no_length": (
        raw_settings("<U", b""),
        "member 'settings.npy' must be one text of 4 bytes a character, got",
    ),
    "settings_of_no_character": (
        raw_settings("<U1", struct.pack("<I", 0x110000)),
        "member 'settings.npy' must hold characters",
    ),
    "settings_of_half_a_character": (
        raw_settings("<U1", struct.pack("<I", 0xD800)),
        "member 'settings.npy' must hold",
    ),
    "settings_of_nulls": (
        raw_settings("<U2", bytes(8)),
        "settings must be a JSON object of them, as state_dict gives it, got",
    ),
    "settings_of_a_number": (
        settings(np.array("1")),
        "settings must be a JSON object of them, as state_dict gives it, got '1'",
    ),
    "settings_of_a_list": (
        settings(np.array("[]")),
        "settings must be a JSON object of them, as state_dict gives it, got '[]'",
    ),
    "settings_of_code": (
        settings(np.array("__import__('os').abort()")),
        "settings must be a JSON object of them",
    ),
    "settings_of_many_digits": (
        settings(np.array('{"eps": ' + "1" * 9000 + "}")),
        "settings must be a JSON object of them",
    ),
    "settings_nested": (
        settings(np.array('{"eps": ' + "[" * 12000)),
        "settings must be a JSON object of them",
    ),
    "settings_nested_whole": (
        settings(np.array('{"eps": ' + "[" * 6000 + "]" * 6000 + "}")),
        "settings must be a JSON object",
    ),
    "settings_of_true_for_one": (
        settings(np.array(str(SETTINGS).replace('"ddof": 1', '"ddof": true'))),
        "state must have the settings of this layer, ddof=1, got ddof=True: make",
    ),
    "settings_lacking": (
        settings(np.array(str(SETTINGS).replace('"ddof": 1, ', ""))),
        "state must have the settings of this layer, ddof=1, got ddof=nothing: make",
    ),
    "settings_more": (
        settings(np.array(str(SETTINGS).replace('"ddof"', '"new\x1b[2J": 2, "ddof"'))),
        "settings must be a JSON object of them",
    ),
    "settings_more_escaped": (
        settings(np.array(str(SETTINGS).replace('"ddof"', r'"new\u001b[2J": 2, "ddof"'))),
        r"state must have the settings of this layer, new\x1b[2J=nothing, got new\x1b[2J=2: make",
    ),
    # Values that are not the ones.
    "format_version_2": (
        lambda: zip_of(members(format_version=npy(np.int64(2)), future=npy(1.0))),
        "format_version must be 1, the one that this release of batchnorm reads, got 2",
    ),
    "format_version_0": (
        lambda: zip_of(members(format_version=npy(np.int64(0)))),
        "format_version must be 1",
    ),
    "format_version_text": (
        lambda: zip_of(members(format_version=npy(np.array("1")))),
        "member 'format_version.npy' must have dtype '<i8', got '<U1'",
    ),
    "nan_gamma": (
        gamma(npy(np.array([1, np.nan, 1], np.float32))),
        "gamma must be finite, got nan in channel 1",
    ),
    "inf_mean": (
        lambda: zip_of(members(running_mean=npy(np.array([0, 0, np.inf])))),
        "running_mean must be finite, got inf in channel 2",
    ),
    "negative_var": (
        lambda: zip_of(members(running_var=npy(np.array([1, 1, -1e-300])))),
        "running_var must be >= 0, got -1e-300 in channel 2",
    ),
    "negative_count": (
        lambda: zip_of(members(update_count=npy(np.int64(-1)))),
        "update_count must be from 0 to 2**63 - 1, got -1",
    ),
}
HOSTILE["object_dtype"] = (lambda: zip_of(members(gamma=object_array())), HOSTILE["object_dtype"][1])


def test_the_good_file_that_the_hostile_ones_are_made_of_loads(tmp_path):
    (tmp_path / "layer.npz").write_bytes(good())
    layer = bn.BatchNorm(C)
    layer.load(tmp_path / "layer.npz")
    assert all(same_bits(value, STATE[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_and_changes_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHNORM_TEST_EXPLOIT", str(tmp_path / "exploited"))
    build, text = HOSTILE[name]
    path = tmp_path / "layer.npz"
    path.write_bytes(build())
    layer = layer_with_state()
    before = snapshot(layer)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        layer.load(path)
    assert snapshot(layer) == before
    assert [p.name for p in tmp_path.iterdir()] == ["layer.npz"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_cannot_ask_for_memory(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHNORM_TEST_EXPLOIT", str(tmp_path / "exploited"))
    path = tmp_path / "layer.npz"
    path.write_bytes(HOSTILE[name][0]())
    layer = bn.BatchNorm(C)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            layer.load(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 512 * 1024  # a file is at most 64 KiB, and read, split and decoded once


def test_a_terabyte_of_file_is_not_read(tmp_path):
    with (tmp_path / "layer.npz").open("wb") as file:
        try:
            file.truncate(2**40)  # takes no room on a file system with sparse files
        except OSError:
            pytest.skip("no sparse files here")
    text = f"^file must have at most {65616 + SETTINGS.nbytes} bytes for this state, got {2**40}"
    with pytest.raises(ValueError, match=text):
        bn.BatchNorm(C).load(tmp_path / "layer.npz")


def test_a_file_of_too_many_channels_is_told_so_and_not_its_size(tmp_path):
    bn.BatchNorm(100_000, eps=1.0).save(tmp_path / "layer.npz")
    with pytest.raises(ValueError, match=re.escape("channels=3, eps=1e-05, got channels=100000, eps=1.0: ")):
        bn.BatchNorm(C).load(tmp_path / "layer.npz")
    with pytest.raises(ValueError, match="file must have at most"):
        bn.BatchNorm(C).load(tmp_path / "layer.npz", strict=False)


def test_a_refused_file_is_named_in_a_note(tmp_path):
    (tmp_path / "layer.npz").write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        bn.BatchNorm(C).load(tmp_path / "layer.npz")
    assert caught.value.__notes__ == [f"while reading the state file {str(tmp_path / 'layer.npz')!r}"]


def test_settings_of_another_spelling_are_the_same(tmp_path):
    spelled = json.dumps(dict(sorted(json.loads(str(SETTINGS)).items())), indent=1)
    path = tmp_path / "layer.npz"
    path.write_bytes(zip_of(members(settings=npy(np.array(spelled)))))
    bn.BatchNorm(C).load(path)


OTHER_SETTINGS = {
    "channels": ({"channels": 4}, "channels=3, got channels=4"),
    "axis": ({"axis": -1}, "axis=1, got axis=-1"),
    "eps": ({"eps": 1e-3}, "eps=1e-05, got eps=0.001"),
    "update_rate": ({"update_rate": 0.2}, "update_rate=0.1, got update_rate=0.2"),
    "pooled": ({"update_rate": None}, "update_rate=0.1, got update_rate=None"),
    "ddof": ({"ddof": 0}, "ddof=1, got ddof=0"),
    "gamma": ({"gamma": False}, "gamma=True, got gamma=False"),
    "beta": ({"beta": False}, "beta=True, got beta=False"),
    "dtype": ({"dtype": "float64"}, "dtype='float32', got dtype='float64'"),
    "debias": ({"debias": True}, "debias=False, got debias=True"),
    "domains": ({"domains": 2}, "domains=None, got domains=2"),
    "ghost_size": ({"ghost_size": 2}, "ghost_size=None, got ghost_size=2"),
    "renorm": (
        {"renorm": bn.RenormSchedule.constant(2, math.inf)},
        (
            "renorm=None, parity=None, got renorm={'r_max': [[0, 2.0]], 'd_max': [[0, inf]], 'weight': [[0, 1.0]]}, "
            "parity='paper'"
        ),
    ),
    "activation": ({"activation": "relu"}, "activation=None, got activation='relu'"),
    "weights_are": ({"weights_are": "counts"}, "weights_are=None, got weights_are='counts'"),
    "convention": (
        {"convention": "keras"},
        "axis=1, eps=1e-05, update_rate=0.1, ddof=1, got axis=-1, eps=0.001, update_rate=0.01, ddof=0",
    ),
}


@pytest.mark.parametrize("way", ["file", "state_dict"])
@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_a_state_of_other_settings_is_refused_and_each_is_named(name, way, tmp_path):
    settings, text = OTHER_SETTINGS[name]
    other, layer = bn.BatchNorm(**{"channels": C, **settings}), layer_with_state()
    before = snapshot(layer)
    with pytest.raises(ValueError) as caught:
        if way == "file":
            other.save(tmp_path / "layer.npz")
            layer.load(tmp_path / "layer.npz")
        else:
            layer.load_state_dict(other.state_dict())
    assert str(caught.value) == (
        f"state must have the settings of this layer, {text}: make the layer with those, or pass strict=False to take "
        "the arrays as those of this layer"
    )
    assert snapshot(layer) == before


ALL_SETTINGS = set(inspect.signature(bn.BatchNorm).parameters) - {"others"}


def test_every_setting_is_compared_but_those_that_say_how_a_call_behaves():
    behaviour = {"nonfinite", "single_value", "num_threads", "convention"}
    assert set(json.loads(str(SETTINGS))) == ALL_SETTINGS - behaviour
    other = bn.BatchNorm(C, nonfinite="raise", single_value="skip", num_threads=2, parity="keras")
    bn.BatchNorm(C).load_state_dict(other.state_dict())


@pytest.mark.parametrize("way", ["file", "state_dict"])
def test_the_parity_of_renorm_is_compared(way, tmp_path):
    paper, keras = (bn.BatchNorm(C, renorm=bn.RenormSchedule.paper(), parity=parity) for parity in ("paper", "keras"))
    keras.save(tmp_path / "layer.npz")
    with pytest.raises(ValueError, match="parity='paper', got parity='keras'"):
        if way == "file":
            paper.load(tmp_path / "layer.npz")
        else:
            paper.load_state_dict(keras.state_dict())


@pytest.mark.parametrize("way", ["file", "state_dict"])
@pytest.mark.parametrize(
    "settings", [{"axis": -1}, {"eps": 1e-3}, {"update_rate": 0.2}, {"ddof": 0}, {"activation": "relu"}]
)
def test_where_asked_the_arrays_are_taken_whatever_the_settings(settings, way, tmp_path):
    layer, other = bn.BatchNorm(C), layer_with_state(**settings)
    if way == "file":
        other.save(tmp_path / "layer.npz")
        layer.load(tmp_path / "layer.npz", strict=False)
    else:
        layer.load_state_dict(other.state_dict(), strict=False)
    state = layer.state_dict()
    assert all(same_bits(state[name], value) for name, value in ARRAYS.items())
    assert state["settings"] == SETTINGS


@pytest.mark.parametrize("name", ["channels", "dtype", "gamma", "pooled", "domains"])
def test_arrays_that_do_not_fit_are_refused_even_where_asked(name, tmp_path):
    settings, _ = OTHER_SETTINGS[name]
    other, layer = bn.BatchNorm(**{"channels": C, **settings}), layer_with_state()
    before = snapshot(layer)
    other.save(tmp_path / "layer.npz")
    with pytest.raises(ValueError, match=r"^(member|file)"):
        layer.load(tmp_path / "layer.npz", strict=False)
    with pytest.raises((TypeError, ValueError), match="must have"):
        layer.load_state_dict(other.state_dict(), strict=False)
    assert snapshot(layer) == before


def test_pooled_statistics_are_derived_with_the_ddof_of_the_layer_where_asked(tmp_path):
    biased, layer = bn.BatchNorm(C, update_rate=None, ddof=0), pooled_layer()
    layer.save(tmp_path / "layer.npz")
    with pytest.raises(ValueError, match="ddof=0, got ddof=1"):
        biased.load(tmp_path / "layer.npz")
    biased.load(tmp_path / "layer.npz", strict=False)
    np.testing.assert_allclose(biased.running_var, layer.running_var * (59 / 60), rtol=1e-14)
    assert (biased.running_mean == layer.running_mean).all()


def test_a_state_without_settings_is_refused_unless_asked(tmp_path):
    text = (
        "state must have the settings that its arrays belong to, got none: pass strict=False to take the arrays as those "
        "of this layer"
    )
    path = tmp_path / "layer.npz"
    path.write_bytes(zip_of(members(settings=None)))
    layer = bn.BatchNorm(C)
    for load, state in ((layer.load, path), (layer.load_state_dict, ARRAYS)):
        with pytest.raises(ValueError) as caught:
            load(state)
        assert str(caught.value) == text
        load(state, strict=False)
        with pytest.raises(TypeError, match=r"^strict must be True or False, got int$"):
            load(state, strict=0)
    assert all(same_bits(layer.state_dict()[name], value) for name, value in ARRAYS.items())


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        (3, TypeError, "settings must be a text, as state_dict gives it, got int"),
        (np.zeros(2), TypeError, "settings must be a text, as state_dict gives it, got ndarray"),
        (b"{}", TypeError, "settings must be a text, as state_dict gives it, got bytes"),
        ("{", ValueError, "settings must be a JSON object of them, as state_dict gives it, got '{'"),
        ({"eps": 1}, TypeError, "settings must be a text, as state_dict gives it, got dict"),
    ],
)
def test_settings_that_are_none_are_told(settings, error, text):
    with pytest.raises(error) as caught:
        bn.BatchNorm(C).load_state_dict(ARRAYS | {"settings": settings})
    assert str(caught.value) == text


def test_settings_may_be_a_plain_str():
    bn.BatchNorm(C).load_state_dict(ARRAYS | {"settings": str(SETTINGS)})


def test_a_long_schedule_can_be_loaded_as_it_was_saved(tmp_path):
    points = tuple((step, 1.0 + step / 7) for step in range(3000))
    layers = [bn.BatchNorm(1, renorm=bn.RenormSchedule(points, ((0, 1.0),))) for _ in range(2)]
    layers[0].save(tmp_path / "layer.npz")
    layers[1].load(tmp_path / "layer.npz")
    with pytest.raises(ValueError, match=r"^file must have at most"):
        bn.BatchNorm(1).load(tmp_path / "layer.npz")  # the settings alone are too large to be compared


def load_or_refuse(raw, path, layer=None):
    """Load `raw`: True where it is the good state, False where it is refused. Nothing else may happen."""
    with path.open("r+b" if path.exists() else "wb") as file:  # some file systems flush a file that is emptied first
        file.write(raw)
        file.truncate()
    layer = layer or bn.BatchNorm(C)
    before = snapshot(layer)
    try:
        layer.load(path)
    except ValueError:
        assert snapshot(layer) == before
        return False
    assert all(same_bits(value, STATE[name]) for name, value in layer.state_dict().items())
    return True


def test_every_truncation_is_refused(tmp_path):
    raw, layer = good(), bn.BatchNorm(C)
    assert not any(load_or_refuse(raw[:size], tmp_path / "layer.npz", layer) for size in range(len(raw)))


def test_every_changed_byte_is_refused_or_makes_no_difference(tmp_path):
    raw, layer = good(), bn.BatchNorm(C)
    harmless = 0
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 0x55
        harmless += load_or_refuse(changed, tmp_path / "layer.npz", layer)
    # Dates, versions and permissions of 7 members: 2 + 4 bytes in a local header, 4 + 4 + 6 in the directory.
    assert harmless == 7 * (2 + 4 + 4 + 4 + 6)


@given(data=st.data())
def test_spliced_files_are_refused_or_make_no_difference(data, tmp_path_factory):
    raw = good()
    begin = data.draw(st.integers(0, len(raw)), "begin")
    end = data.draw(st.integers(begin, len(raw)), "end")
    inserted = data.draw(st.binary(max_size=64) | st.just(raw[end:]) | st.just(raw[:begin]), "inserted")
    load_or_refuse(raw[:begin] + inserted + raw[end:], tmp_path_factory.mktemp("splice") / "layer.npz")
