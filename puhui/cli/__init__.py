"""The command line: `puhui`.

`app` puts the commands together; `run`, `session`, `exec`, `shares`, `jobs`, `results`, `predict`, `fleet`, `local`
and `about` are one family of commands each. `spec_options`, `job_options` and `job_file` turn what people write into
a JobSpec, `find_job` finds the job that they mean; `terminal`, `raw_terminal`, `message_json`, `words`, `story`,
`share_facts` and `chart` turn what a centre says into what people and scripts read.
"""

import os
import sys


def main() -> None:
    """Runs the program `puhui`."""
    # gRPC's C core reports every lost connection on stderr; the commands say it in their own words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # typer would colour the help in a pipe when CI variables ask for it.
    if not sys.stdout.isatty():
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
    from puhui.cli.app import run

    sys.exit(run(sys.argv[1:]))
