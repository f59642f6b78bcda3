"""What kind of file it is: programs, libraries, object files, cores, archives, linker scripts."""
