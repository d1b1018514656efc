#!/bin/sh
# The steps of the Dockerfile, which can be run outside of it as well; from the repository's root.
#   install.sh dependencies VENV      a virtual environment with everything but Remuda (TORCH_INDEX: where torch is; EXTRA: gpu)
#   install.sh remuda VENV            Remuda itself, with its native kernels
#   install.sh bill VENV FILE         what is in it, as CycloneDX JSON
set -eu

step=$1
venv=$2

case $step in
dependencies)
  python3 -m venv "$venv"
  # torch's CUDA build asks for a Triton of its own.
  grep -v '^triton==' constraints.txt >"$venv/constraints.txt"
  "$venv/bin/pip" install --no-cache-dir --quiet -c "$venv/constraints.txt" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
  "$venv/bin/python" - <<'PYTHON' >"$venv/requirements.txt"
import os
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extra = os.environ.get("EXTRA")
print("\n".join(project["dependencies"] + (project["optional-dependencies"][extra] if extra else [])))
PYTHON
  "$venv/bin/pip" install --no-cache-dir --quiet -c "$venv/constraints.txt" -r "$venv/requirements.txt"
  ;;
remuda)
  "$venv/bin/pip" wheel --no-cache-dir --quiet --no-deps --wheel-dir "$venv/wheels" .
  "$venv/bin/pip" install --no-cache-dir --quiet --no-deps "$venv"/wheels/remuda-*.whl
  rm -r "$venv/wheels"
  cd / # so that the installed package is what is looked at
  "$venv/bin/python" -c 'from engine.kernels.native_library import is_built; raise SystemExit(not is_built())' || {
    echo "the native kernels were not built" >&2
    exit 1
  }
  "$venv/bin/remuda" --version
  ;;
bill)
  python3 -m venv "$venv-bill"
  "$venv-bill/bin/pip" install --no-cache-dir --quiet 'cyclonedx-bom>=7,<8'
  "$venv-bill/bin/cyclonedx-py" environment "$venv/bin/python" --output-format JSON --output-file "$3"
  rm -r "$venv-bill"
  ;;
*)
  echo "no step $step" >&2
  exit 2
  ;;
esac
