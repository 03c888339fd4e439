# SPDX-License-Identifier: Apache-2.0
"""The key broker's decision log as everybody reads it: what an entry says, and what proves that it was not changed.

entry.py       one decision or change of a key, and its bytes in the log
start.py       the entry that a broker's life begins with: its receipt key, and that key's word for the log
note.py        signed notes                     checkpoint.py  the log's size and root, as a signed note
proofs.py      what follows from a checkpoint   documents.py   receipts and proofs as files
logfile.py     an exported log, line by line    seen.py        the last checkpoint that somebody saw
"""
