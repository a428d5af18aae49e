#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What `make setup` does before pip: `setup.sh packages` sees to the distribution's packages, `setup.sh venv DIR`
# creates a virtual environment with a Python that is new enough. Looks for what is needed, not for package names,
# so that nothing is installed on a machine that has it from elsewhere.
set -euo pipefail

find_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

has_header() { echo "#include <$1>" | c++ -std=c++20 -E -x c++ - >/dev/null 2>&1; }

missing_packages() {
  local python header
  command -v c++ >/dev/null && command -v ld >/dev/null || echo g++
  has_header hwy/highway.h || echo libhwy-dev
  has_header gtest/gtest.h || echo libgtest-dev
  has_header benchmark/benchmark.h || echo libbenchmark-dev
  python=$(find_python)
  if [ -z "$python" ]; then
    echo python3 python3-venv python3-dev
    return
  fi
  "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  [ -f "$header" ] || echo python3-dev
}

packages() {
  local -a missing as_root=()
  mapfile -t missing < <(missing_packages | tr ' ' '\n')
  if [ ${#missing[@]} -eq 0 ]; then return; fi
  if [ "$(id -u)" -ne 0 ]; then as_root=(sudo); fi
  if ! command -v apt-get >/dev/null || { [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null; }; then
    echo "Missing: ${missing[*]} (names of Debian and Ubuntu). Install them, then run this again." >&2
    exit 1
  fi
  echo "Installing ${missing[*]}"
  "${as_root[@]}" apt-get update
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
  mapfile -t missing < <(missing_packages | tr ' ' '\n')
  if [ ${#missing[@]} -ne 0 ]; then
    echo "Still missing after installation: ${missing[*]}" >&2
    exit 1
  fi
}

case "${1:-}" in
  packages) packages ;;
  venv) "$(find_python)" -m venv "$2" ;;
  *) echo "usage: setup.sh packages | venv DIR" >&2; exit 2 ;;
esac
