#!/bin/sh
# A cluster on one machine: infra/local_cluster.sh up|down|status (--help has the options).
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$root/infra/local_cluster.py" "$@"
