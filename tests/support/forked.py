"""Long-tailed training, again and again: ``python -m tests.support.forked``.

Each line of standard input, ``[LIMIT, ARGUMENT, ...]``, is a run whose files may have LIMIT bytes,
if that is not null. It is forked after the imports, which are half of its time. The answer is two
lines: its process, and at its end ``[exit code, what it printed]``.
"""

import ctypes
import faulthandler
import json
import os
import resource
import sys

from benchmarks import longtail

assert len(os.listdir("/proc/self/task")) == 1  # a fork of several threads may hang

for line in sys.stdin:
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(theirs, 1)
        os.dup2(theirs, 2)
        faulthandler.dump_traceback_later(300, exit=True)
        # Without its capabilities root, too, must keep to the permissions of files.
        ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())
        limit, *sys.argv[1:] = json.loads(line)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        longtail.main()
        sys.exit()
    os.close(theirs)
    print(child, flush=True)
    with open(ours) as file:
        printed = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, printed]), flush=True)
