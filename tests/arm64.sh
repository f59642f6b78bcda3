# What tools/arm64 --test runs on an aarch64 kernel; with `short` a proof, an audit and ten loads of it.
set -u
library=/usr/lib/aarch64-linux-gnu
status=0 slow=0 # a step that takes longer than it may says nothing: this is an emulation
step() { # NAME COMMAND…: its last lines, and how it ended
    local name=$1 code began=$SECONDS
    shift
    timeout 300 bash -c '"$@"' - "$@" </dev/null >/tmp/output 2>&1
    code=$?
    case $code in 0) ;; 124) slow=75 ;; *) status=1 ;; esac
    echo "== $name: $([ "$code" = 124 ] && echo timed out || echo "exit status $code"), $((SECONDS - began)) s"
    if [ "$code" -eq 0 ]; then tail -3 /tmp/output; else tail -60 /tmp/output; fi
}
told() { # STATUS PATTERN COMMAND…: it ends with that status, and what it prints has the pattern in it
    local wanted=$1 pattern=$2 text code
    shift 2
    text=$("$@" 2>&1)
    code=$?
    printf '%s\n' "$text"
    [ "$code" -eq "$wanted" ] && grep -qE -- "$pattern" <<<"$text"
}
export -f told
on_pages() { # BYTES STEP…: what the size of a page does not change is tried on one of the two kernels, each its share
    [ "$(getconf PAGESIZE)" != "$1" ] || step "${@:2}"
}
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # nothing here needs hypothesis's, which takes seconds to import

# --------------------------------------------------------------------------------------------- the short version
step doctor miniloader doctor
step "demo" told 0 'proven' tools/demo
for name in libz.so.1 libexpat.so.1 libsqlite3.so.0 libssl.so.3 libstdc++.so.6 libm.so.6 libffi.so.8 liblzma.so.5 \
    libncursesw.so.6 libuuid.so.1; do
    step "load $name" miniloader load "$library/$name"
done
step "audit against smaps" python -m tests.arm64_audit
[ "${1-}" != short ] || exit "$((status ? status : slow))"

# -------------------------------------------------------------------------------- loaded, and compared with dlopen
zlib=$library/libz.so.1
step fixtures python -m tests.arm64_fixtures
step corpus tools/corpus --jobs 1 --seconds 100 "$zlib" "$library"/lib{crypto.so.3,stdc++.so.6,m.so.6,sqlite3.so.0}
step "load --lazy" told 0 '= 907060870' miniloader load "$zlib" --lazy --call 'crc32(0, "hello", 5)->ulong'
step disasm told 0 'crc32' miniloader disasm "$zlib" crc32 --loaded

for name in libz.so.1 libstdc++.so.6 libcrypto.so.3; do
    step "prepare $name" miniloader prepare "$library/$name"
    step "load $name --prepared" told 0 '[0-9]+ pages from the cache' miniloader load "$library/$name" --prepared
done
step "corpus --prepared" tools/corpus --jobs 1 --seconds 100 --prepared "$library"/lib{crypto.so.3,stdc++.so.6}

# ------------------------------------------------------------------------------------------------------ programs
step "run --strict" miniloader run --strict -c 'import sqlite3, ssl; print(ssl.OPENSSL_VERSION)'
step "run --strict numpy" miniloader run --strict -c '
import bz2, ctypes, decimal, lzma, numpy, pyexpat
print(numpy.linalg.svd(numpy.eye(3) * 2)[1], decimal.Decimal(2).sqrt(), lzma.decompress(lzma.compress(b"a")))'
on_pages 16384 "run --strict threads" told 0 '^20 different' miniloader run --strict -c '
import hashlib, zlib
from concurrent.futures import ThreadPoolExecutor
data = [bytes([number]) * 100_000 for number in range(20)]
with ThreadPoolExecutor(4) as pool:
    print(len(set(pool.map(lambda text: hashlib.sha256(zlib.compress(text)).digest(), data))), "different")'
on_pages 4096 gdb told 0 'hit Breakpoint 1.* triple ' gdb -q -nx -batch -ex 'set debuginfod enabled off' \
    -ex 'set breakpoint pending on' -ex 'set follow-fork-mode child' -ex 'break triple' -ex run -ex 'backtrace 2' \
    -ex continue --args python -m miniloader load "$MINILOADER_FIXTURES/libdemo.so" --gdb --call 'demo_apply(3, 7)->long'

# ------------------------------------------------------------------------------------------------ taught, and tested
step chapters miniloader walkthrough --all --no-pause
# Where a fault maps no page but its own: no chapter may judge a page that it did not touch itself.
one_page_a_fault() { # COMMAND…: run so
    local knob=/sys/kernel/debug/fault_around_bytes kept code
    mountpoint -q /sys/kernel/debug || mount -t debugfs debug /sys/kernel/debug || return
    kept=$(<"$knob")
    getconf PAGESIZE >"$knob" && [ "$(<"$knob")" = "$(getconf PAGESIZE)" ] && "$@"
    code=$?
    echo "$kept" >"$knob"
    return "$code"
}
export -f one_page_a_fault
on_pages 4096 "chapters, one page a fault" one_page_a_fault miniloader walkthrough --all --no-pause
each_program() { # DIRECTORY: each ends with 0
    local program failed=
    for program in "$1"/*; do
        echo "-- ${program##*/}"
        "$program" || failed="$failed ${program##*/}"
    done
    echo "failed:${failed:- none}"
    [ -z "$failed" ]
}
export -f each_program
on_pages 16384 "chapters' programs in C" each_program "$MINILOADER_FIXTURES/chapters"
mkdir /tmp/shop
cat >/tmp/shop/shop.py <<'END'
import ctypes
import platform
from pathlib import Path

import miniloader

library = ctypes.CDLL(str(Path(miniloader.__file__).parent / f"lab/demo/libdemo-{platform.machine()}.so"))


def handle(request):
    library.demo_next()
    return library.demo_add(request, 1)
END
cat >/tmp/shop/test_shop.py <<'END'
from miniloader.testing import assert_copied_only, assert_private_pages, assert_shared


def look(crew):
    workers = crew(1, module="shop").fork(3)
    before = workers.snapshot("forked", library="libdemo")
    assert workers.call("handle", 1) == [2] * 3
    return [before, workers.snapshot("one request later", library="libdemo")]


def test_what_is_so(crew):
    looks = look(crew)
    assert_shared(looks[1], section=".text")
    assert_copied_only(looks, symbols=["demo_counters"])
    assert_private_pages(looks[1], at_most=8)


def test_what_is_not_so(crew):
    assert_copied_only(look(crew), symbols=["demo_spare"])
END
plugin="python -m pytest -q -p no:cacheprovider -p miniloader.testing --rootdir /tmp/shop /tmp/shop"
step "pytest plugin" told 1 '1 failed, 1 passed' $plugin
step "pytest, the suite's audits" python -m pytest -q -p no:cacheprovider tests/lab/audit/test_audit.py -k smaps
on_pages 16384 "pytest, what libraries open" python -m pytest -q -p no:cacheprovider tests/loader/from_inside/test_like_dlopen_inside.py

# --------------------------------------------------------------------------------------------- as an ordinary user
chown 65534 /home/user
as_user="setpriv --reuid 65534 --regid 65534 --clear-groups env HOME=/home/user"
step "user: prove" told 0 'proven' $as_user miniloader prove "$zlib" -n 2
step "user: load --lazy" told 0 '= 907060870' $as_user miniloader load "$zlib" --lazy --call 'crc32(0, "hello", 5)->ulong'
step "user: prepare" $as_user miniloader prepare "$library/libcrypto.so.3"
step "user: load --prepared" told 0 '[0-9]+ pages from the cache' $as_user miniloader load "$library/libcrypto.so.3" --prepared
step "user: run --strict" $as_user miniloader run --strict -c 'import sqlite3, ssl; print(ssl.OPENSSL_VERSION)'
step "user: audit" $as_user python -m tests.arm64_audit
on_pages 16384 "user: chapters" $as_user miniloader walkthrough --all --no-pause
on_pages 4096 "user: pytest plugin" told 1 '1 failed, 1 passed' $as_user $plugin
exit "$((status ? status : slow))"
