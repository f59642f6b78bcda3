"""A program whose libraries we load: the interpreter's own calls of dlopen(3) are led to us, and put back.

CPython's import machinery then initialises every module itself, and ctypes and cffi load through us, too.
:mod:`~miniloader.loader.running.importing` begins; what it cost is :mod:`~miniloader.loader.running.bill`.
"""
