"""The audit of running processes: which of their pages are private, what they cost, and why.

Data moves down this list.  ``survey`` looks at one process; ``audit`` puts the surveys of all together.

- ``select``: which processes are meant, and which libraries.
- ``outline``: the mappings of one process, in columns.
- ``process_pages``: all pages of one process, as its page table has them.
- ``mapped_files``: the files behind its mappings, opened once and told apart; ``prepared_pages`` finds the
  files of the cache of prepared libraries among them.
- ``arrangement``: where these files lie in it: load biases.
- ``survey``: one look at one process, with the cause of each copied page (:mod:`miniloader.evidence.cause`).
- ``mappings``: what every mapping costs, not only those of files.
- ``library``: one library over all processes; ``audit``: all libraries, and what each process costs.
- ``result``: what was found, as frozen values; ``growth``: what grew between two of these; ``diff``: which
  pages of files differ.

For a person to look closer: ``page_words`` shows one page of one process word by word, ``library_pages`` the
pages of the first libraries as pictures.
"""
