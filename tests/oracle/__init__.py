"""The system's loader as an oracle: a library loaded by dlopen(3) and by us, word by word."""
