"""The stand-in libraries: written without a compiler, loaded by the real dynamic loader."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from mud_puppy.errors import UserError
from mud_puppy.rocm import elf, plugin, standins

EXPORTS = [
    ("hipGetDeviceCount", "hip_4.2"),
    ("hipMalloc", "hip_4.2"),
    ("hipMallocAsync", "hip_5.0"),
    ("hipGetErrorString", "hip_4.2"),
    ("ncclCommInitAll", None),
]


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "libstandin.so.7"
    path.write_bytes(standins.library("libstandin.so.7", EXPORTS))
    return path


def test_the_loader_takes_it_and_every_function_is_an_error(written):
    library = ctypes.CDLL(str(written))
    for name in ("hipMalloc", "hipMallocAsync", "ncclCommInitAll"):
        assert getattr(library, name)() == standins.NO_DEVICE
    assert not hasattr(library, "hipNoSuchFunction")


def test_there_is_no_device(written):
    count = ctypes.c_int(7)
    library = ctypes.CDLL(str(written))
    assert library.hipGetDeviceCount(ctypes.byref(count)) == standins.NO_DEVICE
    assert count.value == 0


def test_an_error_has_a_text(written):
    function = ctypes.CDLL(str(written)).hipGetErrorString
    function.restype = ctypes.c_char_p
    assert b"stand-in" in function(1)


def test_versions_are_the_loaders(written):
    library = ctypes.CDLL(str(written))
    find = ctypes.CDLL(None).dlvsym
    find.restype, find.argtypes = ctypes.c_void_p, [ctypes.c_void_p] + 2 * [ctypes.c_char_p]
    assert find(library._handle, b"hipMallocAsync", b"hip_5.0")
    assert not find(library._handle, b"hipMallocAsync", b"hip_4.2")


def test_many_symbols_hash_into_one_table(tmp_path):
    names = [f"symbol_{i}" for i in range(500)]
    path = tmp_path / "libmany.so"
    path.write_bytes(standins.library("libmany.so", [(n, None) for n in names]))
    library = ctypes.CDLL(str(path))
    assert all(getattr(library, name)() == standins.NO_DEVICE for name in names)


def test_the_hash_is_the_system_v_abis():
    # Published values of the ABI's function.
    assert standins.elf_hash("") == 0
    assert standins.elf_hash("printf") == 0x077905A6
    assert standins.elf_hash("GLIBC_2.2.5") == 0x09691A75


def test_a_library_asks_for_what_the_reader_says():
    """The reader against this Python's own extension module of ctypes, which the linker made."""
    import _ctypes

    file = elf.read(_ctypes.__file__)
    assert any(name.startswith("libc.so") for name in file.needed())
    symbols = {s.name: s for s in file.symbols()}
    assert symbols["PyInit__ctypes"].section != 0
    undefined = [s for s in symbols.values() if not s.section and s.version]
    assert ("libc.so.6", "GLIBC_2.2.5") in {s.version for s in undefined}


def test_only_missing_libraries_get_a_standin(monkeypatch, tmp_path):
    """A program that needs libc (here) and another library (not here)."""

    class Plugin(elf.Elf):
        def __init__(self):
            pass

        def needed(self):
            return ["libc.so.6", "libnot-here.so.1"]

        def symbols(self):
            def symbol(name, version, kind=elf.STT_FUNC):
                return elf.Symbol(name, kind, elf.STB_GLOBAL, 0, 0, 0, version)

            yield symbol("printf", ("libc.so.6", "GLIBC_2.2.5"))
            yield symbol("hipFree", ("libnot-here.so.1", "hip_4.2"))
            yield symbol("rocblas_gemm", None)
            yield symbol("an_object", None, kind=1)

    monkeypatch.setattr(elf, "read", lambda path: Plugin())
    (path,) = standins.write(tmp_path / "plugin.so", tmp_path)
    assert path.name.endswith("-libnot-here.so.1")
    assert standins.write(tmp_path / "plugin.so", tmp_path) == [path]  # written once
    library = ctypes.CDLL(str(path))
    assert library.hipFree() and library.rocblas_gemm()
    assert b"printf" not in path.read_bytes() and b"an_object" not in path.read_bytes()


def test_other_machines_are_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(standins.platform, "machine", lambda: "aarch64")
    with pytest.raises(UserError, match="x86-64 Linux only; this is aarch64"):
        standins.write(tmp_path / "plugin.so", tmp_path)


def test_a_damaged_plugin_and_a_cache_that_cannot_be_written_are_told(monkeypatch, tmp_path):
    damaged = tmp_path / "xla_rocm_plugin.so"
    damaged.write_bytes(b"\x7fELF\x02\x01\x01")
    with pytest.raises(UserError, match=f"damaged: {damaged}"):
        standins.load(damaged, tmp_path)
    monkeypatch.setattr(standins, "_exports", lambda plugin: {"libnot-here.so.1": []})
    monkeypatch.setattr(elf, "read", lambda path: None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        standins.write(damaged, tmp_path / "file" / "cache")


def test_no_plugin_is_an_error_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv(plugin.VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=f"pip install --no-deps --target {tmp_path} jax-rocm7"):
        plugin.find()


def test_a_folder_with_a_space_is_quoted_and_a_tilde_is_home(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--target 'my plugin' jax-rocm7"):
        plugin.find(Path("my plugin"))
    library = tmp_path / "rocm plugin" / "jax_plugins" / "xla_rocm7" / "xla_rocm_plugin.so"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(plugin.VARIABLE, "~/rocm plugin")
    assert plugin.find() == library


def test_a_plugin_for_another_jax_is_an_error(tmp_path):
    folder = tmp_path / "jax_plugins" / "xla_rocm7"
    folder.mkdir(parents=True)
    (folder / "xla_rocm_plugin.so").touch()
    (tmp_path / "jax_rocm7_pjrt-0.1.2.dist-info").mkdir()
    with pytest.raises(UserError, match=r"is for jax 0\.1\.2, and jax"):
        plugin.find(tmp_path)


def test_finding_the_plugin_does_not_start_it():
    code = "import sys; from mud_puppy.rocm import compile; compile.available(); " + (
        "assert not any(m.startswith('jax_plugins.') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
