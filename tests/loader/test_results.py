"""Libraries do through our mapping what they do through dlopen's: the same work, the same results."""

from __future__ import annotations

import ctypes
import hashlib
import lzma
import math
import random
import struct
import xml.parsers.expat
import zlib
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int, c_size_t, c_uint, c_ulong, c_void_p
from typing import Any, Protocol

import pytest

import miniloader
from miniloader.loader.surroundings import find_path


class InChild(Protocol):
    def __call__(self, function: Callable[..., Any], /, *arguments: Any) -> Any: ...


class Api:
    """The functions of one library: ``api(name, restype, *argtypes)``, whoever loaded it."""

    def __init__(self, soname: str, *, ours: bool) -> None:
        self.library = miniloader.load(soname) if ours else ctypes.CDLL(soname)

    def __call__(self, name: str, restype: Any, *argtypes: Any) -> Any:
        if isinstance(self.library, miniloader.Library):
            return self.library.function(name, restype, argtypes)
        function = self.library[name]  # by index: not shared with others that declare it differently
        function.restype, function.argtypes = restype, argtypes
        return function

    def close(self) -> None:
        if isinstance(self.library, miniloader.Library):
            self.library.close()


Work = Callable[[Api], Any]

#: Python itself needs them, so that no machine lacks them.
EVERYWHERE = ("libz.so.1", "libm.so.6", "libcrypto.so.3", "libsqlite3.so.0")


def both(in_child: InChild, soname: str, work: Work) -> Any:
    """The result of ``work``, which has to be the same with either loader; each in a child of its own."""
    try:
        find_path(soname)
    except miniloader.LoadError:
        assert soname not in EVERYWHERE, f"{soname} has to be installed for the tests"
        pytest.skip(f"this machine lacks {soname}")

    def run(ours: bool) -> Any:
        api = Api(soname, ours=ours)
        result = work(api)
        api.close()
        return result

    ours, theirs = in_child(run, True), in_child(run, False)
    assert ours == theirs
    return ours


# -------------------------------------------------------------------------------------------- zlib
def work_zlib(api: Api) -> Any:
    compress = api("compress2", c_int, c_char_p, POINTER(c_ulong), c_char_p, c_ulong, c_int)
    uncompress = api("uncompress", c_int, c_char_p, POINTER(c_ulong), c_char_p, c_ulong)
    bound = api("compressBound", c_ulong, c_ulong)
    crc32 = api("crc32", c_ulong, c_ulong, c_char_p, c_uint)
    adler32 = api("adler32", c_ulong, c_ulong, c_char_p, c_uint)
    chance = random.Random(1)
    found = []
    for size in (0, 1, 100, 70_000):
        data = bytes(chance.choices(b"abcdef", k=size))
        for level in (0, 1, 6, 9):
            length = c_ulong(bound(size))
            packed = ctypes.create_string_buffer(length.value)
            assert compress(packed, byref(length), data, size, level) == 0
            again, room = ctypes.create_string_buffer(size + 1), c_ulong(size + 1)
            assert uncompress(again, byref(room), packed, length) == 0
            assert again.raw[: room.value] == data
            assert zlib.decompress(packed.raw[: length.value]) == data
            found.append(packed.raw[: length.value])
        found.append((crc32(0, data, size), adler32(1, data, size)))
        assert found[-1] == (zlib.crc32(data), zlib.adler32(data))
    return found


def test_zlib(in_child: InChild) -> None:
    both(in_child, "libz.so.1", work_zlib)


# -------------------------------------------------------------------------------------------- libm
_ONE = (
    "acos acosh asin asinh atan atanh cbrt ceil cos cosh erf erfc exp exp10 exp2 expm1 fabs floor j0 j1 "
    "lgamma log log10 log1p log2 logb nearbyint rint round roundeven significand sin sinh sqrt tan tanh "
    "tgamma trunc y0 y1"
).split()
_TWO = "atan2 copysign drem fdim fmax fmin fmod hypot nextafter pow remainder scalb".split()
_SPECIAL = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 5e-324, 1.7976931348623157e308, math.pi, 0.5)


def inputs(count: int) -> list[float]:
    """Of every magnitude, and some that matter."""
    chance = random.Random(count)
    usual = [chance.uniform(-50, 50) for _ in range(count)]
    wide = [math.ldexp(chance.uniform(-1, 1), chance.randrange(-1070, 1023)) for _ in range(count)]
    return [*_SPECIAL, *usual, *wide]


def work_libm(api: Api) -> list[bytes]:
    """Every function's results, as bits: a NaN is no excuse."""
    found = []
    values = inputs(60)
    for kind, suffix, code in ((c_double, "", "d"), (c_float, "f", "f")):
        numbers = [kind(value) for value in values]
        pairs = list(zip(numbers, numbers[::-1] + numbers[:1], strict=False))

        def add(results: Sequence[float], code: str = code) -> None:
            found.append(struct.pack(f"<{len(results)}{code}", *results))

        for name in _ONE:
            function = api(name + suffix, kind, kind)
            add([function(number) for number in numbers])
        for name in _TWO:
            function = api(name + suffix, kind, kind, kind)
            add([function(*pair) for pair in pairs])
        fma = api("fma" + suffix, kind, kind, kind, kind)
        add([fma(a, b, a) for a, b in pairs])
        jn, ldexp = api("jn" + suffix, kind, c_int, kind), api("ldexp" + suffix, kind, kind, c_int)
        add([jn(3, number) for number in numbers])
        add([ldexp(number, 7) for number in numbers])
        ilogb = api("ilogb" + suffix, c_int, kind)
        found.append(repr([ilogb(number) for number in numbers]).encode())
        frexp, modf = (
            api("frexp" + suffix, kind, kind, POINTER(c_int)),
            api("modf" + suffix, kind, kind, POINTER(kind)),
        )
        for number in numbers:
            exponent, whole = c_int(), kind()
            add([frexp(number, byref(exponent)), modf(number, byref(whole)), whole.value, exponent.value])
    return found


def test_libm_bit_for_bit(in_child: InChild) -> None:
    found = both(in_child, "libm.so.6", work_libm)
    assert len(found) > 2 * len(_ONE)
    sine = struct.unpack(f"<{len(found[0]) // 8}d", found[_ONE.index("sin")])
    assert sine[2] == math.sin(1.0)


# --------------------------------------------------------------------------------------- libcrypto
def work_digests(api: Api) -> dict[str, bytes]:
    by_name = api("EVP_get_digestbyname", c_void_p, c_char_p)
    new, free = api("EVP_MD_CTX_new", c_void_p), api("EVP_MD_CTX_free", None, c_void_p)
    init = api("EVP_DigestInit_ex", c_int, c_void_p, c_void_p, c_void_p)
    update = api("EVP_DigestUpdate", c_int, c_void_p, c_char_p, c_size_t)
    final = api("EVP_DigestFinal_ex", c_int, c_void_p, c_char_p, POINTER(c_uint))
    found = {}
    for name in ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "sha3-256", "blake2b512", "sm3"):
        context, length = new(), c_uint()
        assert init(context, by_name(name.encode()), None), name
        for part in (b"", b"abc", bytes(range(256)) * 99):
            assert update(context, part, len(part))
        out = ctypes.create_string_buffer(64)
        assert final(context, out, byref(length))
        free(context)
        found[name] = out.raw[: length.value]
    return found


def work_ciphers(api: Api) -> dict[str, bytes]:
    new, free = api("EVP_CIPHER_CTX_new", c_void_p), api("EVP_CIPHER_CTX_free", None, c_void_p)
    init = api("EVP_EncryptInit_ex", c_int, c_void_p, c_void_p, c_void_p, c_char_p, c_char_p)
    update = api("EVP_EncryptUpdate", c_int, c_void_p, c_char_p, POINTER(c_int), c_char_p, c_int)
    final = api("EVP_EncryptFinal_ex", c_int, c_void_p, c_char_p, POINTER(c_int))
    found = {}
    data = bytes(range(256)) * 5 + b"odd"
    for name in (
        "aes_128_cbc",
        "aes_256_cbc",
        "aes_256_ctr",
        "aes_256_gcm",
        "chacha20_poly1305",
        "camellia_256_cbc",
    ):
        context, length, rest = new(), c_int(), c_int()
        assert init(context, api(f"EVP_{name}", c_void_p)(), None, bytes(range(32)), bytes(range(16)))
        out = ctypes.create_string_buffer(len(data) + 64)
        assert update(context, out, byref(length), data, len(data))
        tail = ctypes.create_string_buffer(64)
        assert final(context, tail, byref(rest))
        free(context)
        found[name] = out.raw[: length.value] + tail.raw[: rest.value]
    return found


def work_rsa(api: Api) -> tuple[int, int, int]:
    """Make a key, sign, verify; spoil the signature and see it refused."""
    make = api("EVP_PKEY_Q_keygen", c_void_p, c_void_p, c_char_p, c_char_p, c_size_t)
    key = make(None, None, b"RSA", 1024)
    assert key
    new = api("EVP_MD_CTX_new", c_void_p)
    sha256 = api("EVP_sha256", c_void_p)()
    sign_init = api("EVP_DigestSignInit", c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p)
    sign = api("EVP_DigestSign", c_int, c_void_p, c_char_p, POINTER(c_size_t), c_char_p, c_size_t)
    check_init = api("EVP_DigestVerifyInit", c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p)
    check = api("EVP_DigestVerify", c_int, c_void_p, c_char_p, c_size_t, c_char_p, c_size_t)
    context, length = new(), c_size_t(128)
    signature = ctypes.create_string_buffer(128)
    assert sign_init(context, None, sha256, None, key)
    assert sign(context, signature, byref(length), b"message", 7)
    good, bad = new(), new()
    assert check_init(good, None, sha256, None, key)
    assert check_init(bad, None, sha256, None, key)
    right = check(good, signature.raw, length, b"message", 7)
    return length.value, right, check(bad, signature.raw, length, b"massage", 7)


def test_digests(in_child: InChild) -> None:
    found = both(in_child, "libcrypto.so.3", work_digests)
    data = b"abc" + bytes(range(256)) * 99
    for name in ("md5", "sha256", "sha512"):
        assert found[name] == hashlib.new(name, data).digest()


def test_ciphers(in_child: InChild) -> None:
    assert len(set(both(in_child, "libcrypto.so.3", work_ciphers).values())) == 6


def test_rsa(in_child: InChild) -> None:
    length, right, wrong = both(in_child, "libcrypto.so.3", work_rsa)
    assert (length, right) == (128, 1)
    assert wrong != 1


# ----------------------------------------------------------------------------------------- sqlite3
def work_sqlite(api: Api) -> Any:
    handler = ctypes.CFUNCTYPE(c_int, c_void_p, c_int, POINTER(c_char_p), POINTER(c_char_p))
    database = c_void_p()
    assert api("sqlite3_open", c_int, c_char_p, POINTER(c_void_p))(b":memory:", byref(database)) == 0
    execute = api("sqlite3_exec", c_int, c_void_p, c_char_p, handler, c_void_p, c_void_p)
    found = []

    @handler
    def row(_: Any, count: int, values: Any, names: Any) -> int:
        found.append([(names[index], values[index]) for index in range(count)])
        return 0

    function = ctypes.CFUNCTYPE(None, c_void_p, c_int, POINTER(c_void_p))
    value, give = api("sqlite3_value_int", c_int, c_void_p), api("sqlite3_result_int", None, c_void_p, c_int)

    @function
    def triple(context: int, _: int, arguments: Any) -> None:
        give(context, 3 * value(arguments[0]))

    create = api(
        "sqlite3_create_function",
        c_int,
        c_void_p,
        c_char_p,
        c_int,
        c_int,
        c_void_p,
        function,
        c_void_p,
        c_void_p,
    )
    assert create(database, b"triple", 1, 1, None, triple, None, None) == 0
    for statement in (
        b"create table t (id integer primary key, name text, weight real)",
        b"insert into t (name, weight) values ('one', 1.5), ('two', 2.5), ('three', null)",
        b"create index i on t (name)",
        b"select name, weight, triple(id) as threefold from t order by name",
        b"select count(*), sum(weight), group_concat(name) from t",
        b"with recursive n(x) as (select 1 union all select x + 1 from n where x < 50) select sum(x) from n",
        b"select json_extract('{\"a\": [1, 2]}', '$.a[1]'), printf('%.3f', 2.0 / 3)",
    ):
        assert execute(database, statement, row, None, None) == 0, statement
    found.append([execute(database, b"no sql", row, None, None)])
    found.append([api("sqlite3_errmsg", c_char_p, c_void_p)(database)])
    assert api("sqlite3_close", c_int, c_void_p)(database) == 0
    return found


def test_sqlite_calls_back(in_child: InChild) -> None:
    found = both(in_child, "libsqlite3.so.0", work_sqlite)
    assert found[0] == [(b"name", b"one"), (b"weight", b"1.5"), (b"threefold", b"3")]
    assert (b"sum(x)", b"1275") in found[4]


# ------------------------------------------------------------------------------------ expat, lzma
_DOCUMENT = b"<?xml version='1.0'?><a x='1'><!-- c --><b>t\xc3\xa4xt &amp; more</b><b y=\"2\"/></a>"


def work_expat(api: Api) -> Any:
    start_type = ctypes.CFUNCTYPE(None, c_void_p, c_char_p, POINTER(c_char_p))
    end_type = ctypes.CFUNCTYPE(None, c_void_p, c_char_p)
    text_type = ctypes.CFUNCTYPE(None, c_void_p, POINTER(ctypes.c_char), c_int)
    found: list[Any] = []

    @start_type
    def start(_: Any, name: bytes, attributes: Any) -> None:
        pairs = []
        while attributes[len(pairs)]:
            pairs.append(attributes[len(pairs)])
        found.append(("start", name, pairs))

    @end_type
    def end(_: Any, name: bytes) -> None:
        found.append(("end", name))

    @text_type
    def text(_: Any, data: Any, length: int) -> None:
        found.append(("text", data[:length]))

    parser = api("XML_ParserCreate", c_void_p, c_char_p)(None)
    api("XML_SetElementHandler", None, c_void_p, start_type, end_type)(parser, start, end)
    api("XML_SetCharacterDataHandler", None, c_void_p, text_type)(parser, text)
    parse = api("XML_Parse", c_int, c_void_p, c_char_p, c_int, c_int)
    found += [parse(parser, _DOCUMENT[:30], 30, 0), parse(parser, _DOCUMENT[30:], len(_DOCUMENT) - 30, 1)]
    api("XML_ParserFree", None, c_void_p)(parser)
    bad = api("XML_ParserCreate", c_void_p, c_char_p)(None)
    found.append(parse(bad, b"<a></b>", 7, 1))
    code = api("XML_GetErrorCode", c_int, c_void_p)(bad)
    found.append(api("XML_ErrorString", c_char_p, c_int)(code))
    return found


def test_expat_calls_back(in_child: InChild) -> None:
    found = both(in_child, "libexpat.so.1", work_expat)
    expected: list[Any] = []
    parser = xml.parsers.expat.ParserCreate()
    parser.StartElementHandler = lambda name, _: expected.append(("start", name.encode()))
    parser.EndElementHandler = lambda name: expected.append(("end", name.encode()))
    parser.Parse(_DOCUMENT, True)
    assert [item[:2] for item in found if isinstance(item, tuple) and item[0] != "text"] == expected


def work_lzma(api: Api) -> Any:
    sizes = (c_char_p, c_size_t, c_char_p, POINTER(c_size_t), c_size_t)
    encode = api("lzma_easy_buffer_encode", c_int, c_uint, c_int, c_void_p, *sizes)
    data = bytes(range(256)) * 300
    out, length = ctypes.create_string_buffer(1 << 17), c_size_t()
    check_crc64 = 4
    assert encode(6, check_crc64, None, data, len(data), out, byref(length), len(out)) == 0
    packed = out.raw[: length.value]
    assert lzma.decompress(packed) == data
    crc64 = api("lzma_crc64", ctypes.c_uint64, c_char_p, c_size_t, ctypes.c_uint64)
    return packed, crc64(b"123456789", 9, 0), api("lzma_version_string", c_char_p)()


def test_lzma(in_child: InChild) -> None:
    assert both(in_child, "liblzma.so.5", work_lzma)[1] == 0x995DC9BBDF1939FA  # CRC-64/XZ's check value


# ----------------------------------------------------------------------------------------- libxml2
def work_libxml2(api: Api) -> Any:
    document = api("xmlReadMemory", c_void_p, c_char_p, c_int, c_char_p, c_char_p, c_int)(
        _DOCUMENT, len(_DOCUMENT), None, None, 0
    )
    context = api("xmlXPathNewContext", c_void_p, c_void_p)(document)
    evaluate = api("xmlXPathEvalExpression", c_void_p, c_char_p, c_void_p)
    as_text = api("xmlXPathCastToString", c_char_p, c_void_p)
    found = [
        as_text(evaluate(path, context))
        for path in (b"string(//b[1])", b"count(//b)", b"//b/@y", b"concat(/a/@x, '-', name(/*))", b"1 div 3")
    ]
    assert evaluate(b"///", context) is None
    return found


def test_libxml2(in_child: InChild) -> None:
    found = both(in_child, "libxml2.so.2", work_libxml2)
    assert found[:4] == ["täxt & more".encode(), b"2", b"2", b"1-a"]


# ------------------------------------------------------------------------------------------ ICU, z3
def icu() -> str:
    """The soname of this system's ICU."""
    for number in range(90, 60, -1):
        try:
            find_path(f"libicui18n.so.{number}")
        except miniloader.LoadError:
            continue
        return f"libicui18n.so.{number}"
    pytest.skip("this machine lacks libicui18n")


def test_icu_collates(in_child: InChild) -> None:
    soname = icu()
    version = soname.rpartition(".")[2]
    words = ["zebra", "Äpfel", "apfel", "öl", "Zoo", "ñandú", "nada", "æon", "éclair", "eclair"]

    def work(api: Api) -> list[list[str]]:
        compare = api(
            f"ucol_strcollUTF8_{version}", c_int, c_void_p, c_char_p, c_int, c_char_p, c_int, POINTER(c_int)
        )
        found = []
        for locale in (b"de", b"sv", b"es", b"da"):
            status = c_int()
            collator = api(f"ucol_open_{version}", c_void_p, c_char_p, POINTER(c_int))(locale, byref(status))
            assert status.value <= 0

            class Key:
                def __init__(self, word: str) -> None:
                    self.word = word.encode()

                def __lt__(self, other: Any, collator: int = collator, status: Any = status) -> bool:
                    return bool(compare(collator, self.word, -1, other.word, -1, byref(status)) < 0)

            found.append(sorted(words, key=Key))
            api(f"ucol_close_{version}", None, c_void_p)(collator)
        return found

    german, swedish, *_ = both(in_child, soname, work)
    assert german.index("öl") < german.index("zebra")
    assert swedish.index("zebra") < swedish.index("öl")


def work_z3(api: Api) -> list[Any]:
    context = api("Z3_mk_context", c_void_p, c_void_p)(api("Z3_mk_config", c_void_p)())
    evaluate = api("Z3_eval_smtlib2_string", c_char_p, c_void_p, c_char_p)
    return [
        evaluate(context, b"(declare-const x Int)(declare-const y Int)(assert (> x 2))(assert (< y 10))"),
        evaluate(context, b"(assert (= (+ x (* 2 y)) 7))(check-sat)(get-value (x y))"),
        evaluate(context, b"(assert (> (* y y) 100))(assert (> y 0))(check-sat)"),
    ]


def test_z3_solves(in_child: InChild) -> None:
    found = both(in_child, "libz3.so.4", work_z3)
    assert found[1].startswith(b"sat")
    assert found[2].startswith(b"unsat")


# -------------------------------------------------------------------------------------------- LLVM
def work_llvm(api: Api) -> Any:
    """Build a function of two integers, verify it, print it, compile it, call it."""
    pointer = c_void_p
    context = api("LLVMContextCreate", pointer)()
    module = api("LLVMModuleCreateWithNameInContext", pointer, c_char_p, pointer)(b"made", context)
    integer = api("LLVMInt32TypeInContext", pointer, pointer)(context)
    kind = api("LLVMFunctionType", pointer, pointer, POINTER(pointer), c_uint, c_int)(
        integer, (pointer * 2)(integer, integer), 2, 0
    )
    function = api("LLVMAddFunction", pointer, pointer, c_char_p, pointer)(module, b"combine", kind)
    builder = api("LLVMCreateBuilderInContext", pointer, pointer)(context)
    block = api("LLVMAppendBasicBlockInContext", pointer, pointer, pointer, c_char_p)(
        context, function, b"entry"
    )
    api("LLVMPositionBuilderAtEnd", None, pointer, pointer)(builder, block)
    first, second = (api("LLVMGetParam", pointer, pointer, c_uint)(function, index) for index in (0, 1))
    binary = (pointer, pointer, pointer, pointer, c_char_p)
    product = api("LLVMBuildMul", *binary)(builder, first, second, b"product")
    total = api("LLVMBuildAdd", *binary)(builder, product, first, b"total")
    api("LLVMBuildRet", pointer, pointer, pointer)(builder, total)
    message = c_char_p()
    assert api("LLVMVerifyModule", c_int, pointer, c_int, POINTER(c_char_p))(module, 2, byref(message)) == 0
    text = api("LLVMPrintModuleToString", c_char_p, pointer)(module)
    for name in ("TargetInfo", "Target", "TargetMC", "AsmPrinter"):
        api(f"LLVMInitializeX86{name}", None)()
    api("LLVMLinkInMCJIT", None)()
    engine = c_void_p()
    create = api("LLVMCreateExecutionEngineForModule", c_int, POINTER(pointer), pointer, POINTER(c_char_p))
    assert create(byref(engine), module, byref(message)) == 0, message.value
    address = api("LLVMGetFunctionAddress", ctypes.c_uint64, pointer, c_char_p)(engine, b"combine")
    made = ctypes.CFUNCTYPE(c_int, c_int, c_int)(address)
    return text, [made(a, b) for a, b in ((2, 3), (-7, 6), (1 << 20, 1 << 20))]


def test_llvm_compiles_and_runs(in_child: InChild) -> None:
    for number in range(25, 10, -1):
        try:
            find_path(f"libLLVM-{number}.so.1")
        except miniloader.LoadError:
            continue
        text, results = both(in_child, f"libLLVM-{number}.so.1", work_llvm)
        assert b"define i32 @combine" in text
        assert results == [8, -49, 1 << 20]
        return
    pytest.skip("this machine lacks libLLVM")
