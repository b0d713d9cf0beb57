"""Run a module under cProfile: ``python -m tests.benchmark.profiled FILE -m MODULE ARGUMENTS``.

cProfile's own command writes nothing where the program leaves by ``os._exit``, as the standalone proxy does.
"""

from __future__ import annotations

import cProfile
import os
import runpy
import sys
from typing import NoReturn


def main() -> None:
    path, option, module = sys.argv[1:4]
    assert option == "-m", option
    profile = cProfile.Profile()
    leave = os._exit

    def write_and_leave(status: int) -> NoReturn:
        profile.dump_stats(path)
        leave(status)

    os._exit = write_and_leave
    sys.argv = [module, *sys.argv[4:]]
    try:
        profile.runcall(runpy.run_module, module, run_name="__main__", alter_sys=True)
    finally:
        profile.dump_stats(path)


if __name__ == "__main__":
    main()
