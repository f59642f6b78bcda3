"""What differs per processor?  Relocation formulas, code of our own, and disassembly."""
