# Makes the Python environment of this repository, .venv, and leaves its Python in $PYTHON.
#
#   source launch/environment.sh requirements.txt            (paths of requirement files)
#
# A file that is called *-optional.txt is tried after the others, and may fail.
# Does nothing if .venv already holds these very requirements: a stamp in it records their hash.
# For bash; works under `set -euo pipefail`, from any directory.
# shellcheck shell=bash disable=SC2034,SC2317  # PYTHON is for whoever sources this

_root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
_venv="$_root/.venv"

_say() { printf '[environment] %s\n' "$*" >&2; }

_find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c \
        'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  _say 'error: no Python 3.11 or later with venv and ensurepip was found; install one' \
       '(on Debian and Ubuntu: apt install python3 python3-venv)'
  return 1
}

_uv() {  # requirement files, as -r arguments
  # uv does not read pip's settings: a folder of wheels that pip knows is told to it.
  local links
  links="$("$_venv/bin/python" -m pip config get global.find-links 2>/dev/null || true)"
  links="${PIP_FIND_LINKS:-$links}"
  if [ -n "$links" ]; then export UV_FIND_LINKS="${UV_FIND_LINKS:-${links//[[:space:]]/,}}"; fi
  "$_venv/bin/uv" pip install --quiet --compile-bytecode \
    --python "$_venv/bin/python" "$@" -c "$_root/constraints.txt"
}

_install() {  # requirement files, as -r arguments
  _say "installing into $_venv, $("$_venv/bin/python" --version); the first time takes minutes"
  "$_venv/bin/python" -m pip install --quiet --disable-pip-version-check uv \
    && _uv "$@" && return 0
  _say 'uv did not manage; trying pip, which is slower'
  "$_venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" \
      -c "$_root/constraints.txt"
}

_install_optional() {  # a requirement file
  # From where everything comes from; else from PyTorch's index of CPU builds too.
  _uv -r "$1" 2>/dev/null || UV_HTTP_TIMEOUT=20 _uv -r "$1" --index-strategy unsafe-best-match \
    --extra-index-url https://download.pytorch.org/whl/cpu 2>/dev/null && return 0
  _say "not to be had here, so what needs it is left out: $(grep -v '^#' -- "$1" | tr '\n' ' ')"
}

_hash() {  # of the contents of files
  cat -- "$@" | "$_python" -c \
      'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

_make_environment() {  # requirement files
  local stamp="$_venv/requirements.sha256" arguments=() optional=() file base wanted started
  _python="$(_find_python)" || return 1
  for file in "$@"; do
    case "$file" in
      *-optional.txt) optional+=("$file") ;;
      *) arguments+=(-r "$file") ;;
    esac
  done
  # A larger set, such as that of the tests, has the base set too.
  base="$(_hash "$_root/requirements.txt" "$_root/constraints.txt")"
  wanted="$(_hash "$_root/requirements.txt" "$_root/constraints.txt" "$@")"
  [ "$#" = 1 ] && [ "$1" = "$_root/requirements.txt" ] && wanted="$base"
  if [ -x "$_venv/bin/python" ] && grep -qsxF -- "$wanted" "$stamp"; then return 0; fi
  if ! "$_venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$_python" -m venv --clear "$_venv" || return 1
  fi
  # An older base is gone with this installation; a larger set on the same base stays.
  if ! grep -qsxF -- "$base" "$stamp"; then rm -f -- "$stamp"; fi
  started=$SECONDS
  _install "${arguments[@]}" || { _say 'error: the requirements could not be installed'; return 1; }
  for file in ${optional[@]+"${optional[@]}"}; do _install_optional "$file"; done
  printf '%s\n' "$base" "$wanted" >> "$stamp"
  _say "ready after $((SECONDS - started)) s"
}

if ! _make_environment "$@"; then return 1 2>/dev/null || exit 1; fi
PYTHON="$_venv/bin/python"
