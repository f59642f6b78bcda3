# What tools/arm64 --test runs on an aarch64 kernel: a proof, an audit, loads, and the fixtures against dlopen.
set -u
library=/usr/lib/aarch64-linux-gnu
status=0
step() { # NAME COMMAND…: its last lines, and how it ended
    local name=$1 code began=$SECONDS
    shift
    timeout 600 "$@" >/tmp/output 2>&1
    code=$?
    [ "$code" -eq 0 ] || status=1
    echo "== $name: exit status $code, $((SECONDS - began)) s"
    if [ "$code" -eq 0 ]; then tail -3 /tmp/output; else tail -60 /tmp/output; fi
}

step doctor miniloader doctor
step proof miniloader prove "$library/libcrypto.so.3" -n 4
for name in libz.so.1 libexpat.so.1 libsqlite3.so.0 libssl.so.3 libstdc++.so.6 libm.so.6 libffi.so.8 liblzma.so.5 \
    libncursesw.so.6 libuuid.so.1; do
    step "load $name" miniloader load "$library/$name"
done
step call miniloader load "$library/libz.so.1" --lazy --call 'crc32(0, "hello", 5)->ulong'
step prepare miniloader prepare "$library/libz.so.1"
step prepared miniloader load "$library/libz.so.1" --prepared
step run miniloader run --strict -c 'import sqlite3, ssl; print(ssl.OPENSSL_VERSION)'
step chapter miniloader walkthrough relocation
user="setpriv --reuid 65534 --regid 65534 --clear-groups env HOME=/home/user"
chown 65534 /home/user
step "as a user" $user miniloader prove "$library/libz.so.1" -n 2
step disasm miniloader disasm "$library/libz.so.1" crc32 --loaded

python - <<'END' &
import time
import miniloader
kept = [miniloader.load(name) for name in ("libcrypto.so.3", "libz.so.1")]
time.sleep(600)
END
sleep 20
step audit miniloader audit $!
kill $!

step fixtures python -m tests.arm64_fixtures
exit "$status"
