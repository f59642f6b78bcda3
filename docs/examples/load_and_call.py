"""Load a library without the system's loader, call a function of it, and see where it came to lie.

python load_and_call.py
"""

import ctypes

import miniloader


def main() -> None:
    """Compute a checksum with a zlib that ld.so knows nothing of."""
    with miniloader.load("libz.so.1") as library:
        crc32 = library.function(
            "crc32", restype=ctypes.c_ulong, argtypes=[ctypes.c_ulong, ctypes.c_char_p, ctypes.c_uint]
        )
        print(f"{library.path} at {library.base:#x}")
        print(f"crc32 at {library.address('crc32'):#x} says {crc32(0, b'hello', 5):#x}")
        print("with it:", ", ".join(needed.name for needed in library.libraries[1:]))
    # Here the library is closed: its destructors have run, and nothing of it is mapped.


if __name__ == "__main__":
    main()
