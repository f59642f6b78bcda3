"""Extension modules of this Python, loaded by us instead of by ``import``, do what they always do."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import pytest

import miniloader


class InChild(Protocol):
    def __call__(self, function: Callable[..., Any], /, *arguments: Any) -> Any: ...


def origin(name: str) -> str:
    """The file of module ``name``."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".so"):
        pytest.skip(f"this machine lacks {name} as a library of its own")
    return spec.origin


def module_of_ours(name: str) -> ModuleType:
    """The module, made as ``import`` makes one (PEP 489), from our own mapping, which stays."""
    path = origin(name)
    library = miniloader.load(path)
    start = ctypes.PYFUNCTYPE(ctypes.c_void_p)(library.address(f"PyInit_{name}"))
    found = ctypes.cast(start(), ctypes.py_object).value  # its definition, or the module itself
    if isinstance(found, ModuleType):
        return found
    obj = ctypes.py_object
    create = ctypes.PYFUNCTYPE(obj, obj, obj, ctypes.c_int)(("PyModule_FromDefAndSpec2", ctypes.pythonapi))
    execute = ctypes.PYFUNCTYPE(ctypes.c_int, obj, obj)(("PyModule_ExecDef", ctypes.pythonapi))
    python_api_version = 1013
    made: ModuleType = create(
        found, importlib.machinery.ModuleSpec(name, None, origin=path), python_api_version
    )
    assert execute(made, found) == 0
    return made


def work_math(module: Any) -> Any:
    return [module.sin(1.5), module.gamma(4.5), module.factorial(25), module.fsum([0.1] * 10)]


def work_zlib(module: Any) -> Any:
    packer = module.compressobj(9)
    packed = packer.compress(b"abc" * 999) + packer.flush()
    try:
        module.decompress(b"x")
    except module.error as error:
        return packed, module.decompress(packed), module.crc32(packed), str(error)
    return None


def work_json(module: Any) -> Any:
    return [module.encode_basestring_ascii('ä "quoted"'), module.scanstring('a\\n\\u00e4"', 0)]


def work_decimal(module: Any) -> Any:
    with module.localcontext() as context:
        context.prec = 60
        return str(module.Decimal(2).sqrt()), str(module.Decimal(1) / 7)


def work_sqlite(module: Any) -> Any:
    database = module.connect(":memory:")
    database.create_function("triple", 1, lambda number: 3 * number)
    database.execute("create table t (n integer)")
    database.executemany("insert into t values (?)", [(number,) for number in range(50)])
    return database.execute("select sum(n), triple(max(n)), sqlite_version() from t").fetchall()


def work_expat(module: Any) -> Any:
    found: list[Any] = []
    parser = module.ParserCreate()
    parser.StartElementHandler = lambda name, attributes: found.append((name, attributes))
    parser.Parse("<a x='1'><b/>ä</a>", True)
    try:
        module.ParserCreate().Parse("<a></b>", True)
    except module.ExpatError as error:
        found.append(str(error))
    return found


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("math", work_math),
        ("zlib", work_zlib),
        ("_json", work_json),
        ("_decimal", work_decimal),
        ("_sqlite3", work_sqlite),
        ("pyexpat", work_expat),
    ],
)
def test_does_what_the_imported_one_does(in_child: InChild, name: str, work: Callable[[Any], Any]) -> None:
    def ours() -> Any:
        module = module_of_ours(name)
        assert module is not importlib.import_module(name)
        return work(module)

    origin(name)
    assert in_child(ours) == in_child(lambda: work(importlib.import_module(name)))
