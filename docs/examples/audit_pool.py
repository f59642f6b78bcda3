"""Where does the memory of a pool of workers go, and why is it not shared?

python audit_pool.py [PID...]     processes of yours; without any, three workers that are started for this
"""

import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context

import miniloader


def main(pids: list[int]) -> None:
    """Print each file of which these processes have private pages, the costliest first."""
    audit = miniloader.audit(pids)
    for library in sorted(audit.libraries, key=lambda library: -len(library.private_pages)):
        causes = Counter(", ".join(page.causes) for page in library.private_pages)
        for cause, pages in causes.most_common():
            print(f"{pages:5} private pages of {os.path.basename(library.path)}: {cause}")
    print(f"{audit.level}: {len(audit.processes)} processes, unreadable: {len(audit.unreadable)}")


if __name__ == "__main__":
    if sys.argv[1:]:
        main([int(pid) for pid in sys.argv[1:]])
    else:
        with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
            list(pool.map(hash, range(100)))
            main([process.pid for process in active_children() if process.pid])
