#!/usr/bin/env bash
# On every host of a slice, as ~/specdistill/tpu_host.sh: put there and called by tpu_vm.sh.
#
#   tpu_host.sh setup                            unpacks code.tar.gz, makes its environment
#   tpu_host.sh start TOKEN [NAME=VALUE ...] -- [flags of specdistill_jax.main]
#   tpu_host.sh state                            how the last attempt is
#   tpu_host.sh signal TERM|KILL | stop          ends it; after stop it counts as stopped by hand
#   tpu_host.sh tail LINES | follow LINES         its log
#   tpu_host.sh log TOKEN [HOST]                 all of it, of any attempt; of one host alone
#
# All but `setup` may be said twice: ssh is retried when its connection breaks. An attempt is named
# by its token and runs detached, in run/TOKEN: pid, log, exit (the code that it ended with).

set -uo pipefail

home="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
run="$home/run"
last="$run/last"  # a link to the directory of the last attempt
host="$(hostname)"

boot_id() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo none; }

alive() {  # or about to be; a pid of before a reboot is nobody's
  local boot pid shell
  [ -e "$last" ] && [ ! -e "$last/exit" ] || return 1
  if [ ! -e "$last/pid" ]; then [ -n "$(find "$last/" -maxdepth 0 -mmin -1)" ]; return; fi
  read -r boot pid shell < "$last/pid" || return 1
  # Between the program's end and its exit code in writing, the shell that writes it is alive.
  [ "$boot" = "$(boot_id)" ] && [ ! -e "$last/exit" ] \
    && { kill -0 "$pid" || kill -0 "$shell"; } 2>/dev/null
}

report() {  # specdistill-host HOST TOKEN running|exit:CODE|stopped:CODE|lost, or none idle
  local token status=lost
  token="$(basename -- "$(readlink -- "$last" || echo none)")"
  if [ "$token" = none ]; then status=idle
  elif alive; then status=running
  elif [ -e "$last/exit" ]; then
    status="$([ -e "$last/stopped" ] && echo stopped || echo exit):$(cat -- "$last/exit")"
  elif [ -e "$last/stopped" ]; then status=stopped:0
  fi
  printf 'specdistill-host %s %s %s\n' "$host" "$token" "$status"
}

start() {  # token and the rest: nothing happens if it was started, or if another attempt runs
  if ! alive && mkdir -p -- "$run" && mkdir -- "$run/$1" 2>/dev/null; then
    ln -sfn -- "$1" "$last"
    setsid nohup bash "${BASH_SOURCE[0]}" supervise "$@" < /dev/null >> "$run/$1/log" 2>&1 &
  fi
  for _ in {1..50}; do [ -e "$last/pid" ] || sleep 0.1; done
  report
}

supervise() {  # token, variables, --, flags of main
  local directory="$run/$1" variables=() pid code
  shift
  while [ "$1" != -- ]; do variables+=("$1"); shift; done
  shift
  printf 'specdistill_jax on %s, %s: %s\n' "$host" "$(date '+%Y-%m-%d %H:%M:%S')" "$*"
  cd -- "$home/code" || exit 1
  export PYTHONPATH="$home/code" TF_CPP_MIN_LOG_LEVEL=3
  export JAX_COMPILATION_CACHE_DIR="$HOME/.cache/specdistill_jax/xla"
  # A shutdown sends SIGTERM to this shell too; it stays to write down how the program ends.
  trap : TERM
  env ${variables[@]+"${variables[@]}"} .venv/bin/python -P -m specdistill_jax.main "$@" &
  pid=$!
  printf '%s %s %s\n' "$(boot_id)" "$pid" "$$" > "$directory/pid.part"
  mv -- "$directory/pid.part" "$directory/pid"
  while :; do
    wait "$pid"
    code=$?
    kill -0 "$pid" 2>/dev/null || break  # else the signal ended the wait, not the program
  done
  printf '%s\n' "$code" > "$directory/exit.part"
  mv -- "$directory/exit.part" "$directory/exit"
}

signal() {  # TERM: the program saves and ends. KILL: it ends
  local pid
  if alive && [ -e "$last/pid" ]; then
    read -r _ pid _ < "$last/pid"
    kill -s "$1" "$pid" 2>/dev/null  # it may have ended this moment
  fi
  report
}

find_python() {  # TPU VMs have Python 3.10, JAX wants 3.11
  export PATH="$HOME/.local/bin:$PATH"
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
    "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null && return
  done
  command -v uv >/dev/null || python3 -m pip install --user --quiet uv \
    || curl -LsSf https://astral.sh/uv/install.sh | sh || return 1
  uv python install 3.11 || return 1
  PATH="$(dirname -- "$(uv python find --managed-python 3.11)"):$PATH"
}

setup() {
  if alive; then echo "error: $host runs a study; stop it before setting up" >&2; return 1; fi
  rm -rf -- "$home/code.new"
  mkdir -- "$home/code.new" && tar -xzf "$home/code.tar.gz" -C "$home/code.new" || return 1
  if [ -d "$home/code/.venv" ]; then mv -- "$home/code/.venv" "$home/code.new/.venv"; fi
  rm -rf -- "$home/code"
  mv -- "$home/code.new" "$home/code"
  find_python || { echo "error: $host has no Python 3.11 and could not get one" >&2; return 1; }
  # shellcheck source=environment.sh
  source "$home/code/launch/environment.sh" "$home/code/launch/requirements-tpu.txt"
}

verb="${1:-}"
shift || true
case "$verb" in
  setup | start | supervise | signal) "$verb" "$@" ;;
  state) report ;;
  stop) if alive; then touch -- "$last/stopped"; fi; signal TERM ;;
  tail) tail -n "$1" -- "$last/log" ;;
  log) if [ "${2:-$host}" = "$host" ]; then cat -- "$run/$1/log"; fi ;;
  follow) exec tail -n "$1" -F -- "$last/log" ;;
  *) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
