# What tpu_vm.sh, tpu_sweep.sh and xpk.sh share: flags, settings, the study, quoting, dry runs.
# Sourced; for bash 3.2 or later, under `set -euo pipefail`.
# shellcheck shell=bash disable=SC2034,SC2154  # names are shared with who sources this

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
UNAVAILABLE=69  # nothing of ours runs there, and nothing could be started
AGAIN=75        # unfinished; what was saved is in the workdir: run the same command again
OWN_ERROR=64    # the launcher's, never the study's: a flag, a setting, a file that is not committed

exec 3>&1       # where dry runs print, from inside $(...) too
log=/dev/null
dry_run=''

die() { printf 'error: %s\n' "$*" >&2; exit "$OWN_ERROR"; }

note() {  # words: one line for the user, and for the log of what happened
  local line
  [ -z "$dry_run" ] || return 0
  line="$(printf '[%s %s] %s' "${NAME:-launch}" "$(date '+%m-%d %H:%M:%S')" "$*")"
  printf '%s\n' "$line" >&2
  printf '%s\n' "$line" >> "$log"
}

quote() {  # words: one line that any shell reads back as these words
  local word line=''
  for word in "$@"; do
    case "$word" in
      '' | *[!A-Za-z0-9_.,:/=@%+-]*)
        word="'$(printf '%s\n' "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

call() {  # a command: shown in a dry run, else run
  if [ -n "$dry_run" ]; then quote "$@" >&3; else "$@"; fi
}

pause() { if [ -z "$dry_run" ]; then sleep "$1"; fi; }

parse_flags() {  # flags that may be given, then the arguments; leaves flag_NAME, and rest
  local known=" $1 " flag value
  for flag in $1; do printf -v "flag_$flag" ''; done
  shift
  while [ "$#" -gt 0 ] && [ "${1#--}" != "$1" ]; do
    flag="${1#--}"
    value=yes
    case "$flag" in
      help) usage; exit 0 ;;
      *=*) value="${flag#*=}"; flag="${flag%%=*}" ;;
    esac
    case "$known" in
      *" $flag "*) printf -v "flag_$flag" '%s' "$value" ;;
      *) die "--$flag is no flag of this command, whose flags are${known% }; flags of" \
             'specdistill_jax.main come after the config' ;;
    esac
    shift
  done
  rest=("$@")
}

_require() {  # name of a setting
  local hint
  [ -n "${!1:-}" ] && return
  hint="$(sed -n "s/^$1=[^#]*# *//p" "$root/launch/tpu.env.example")"
  die "$1 is missing in $env_file; set it ($hint)"
}

_check_form() {  # name of a setting, pattern of `[[ =~ ]]`, what would be right
  [[ "${!1}" =~ ^($2)$ ]] || die "$1 is '${!1}' in $env_file; it must be $3"
}

read_settings() {  # names of the settings that must be there; after parse_flags
  local setting
  env_file="${flag_env:-$root/launch/tpu.env}"
  [ -f "$env_file" ] \
    || die "$env_file is missing; copy launch/tpu.env.example there and fill it in"
  # A NAME or ZONE that the user's shell happens to export is not meant for us.
  unset PROJECT ZONE BUCKET NAME ACCELERATOR_TYPE RUNTIME_VERSION VALID_UNTIL
  unset XPK_CLUSTER DOCKER_IMAGE
  SLICES=1 SPOT=no PRIORITY=medium QUICK_SECONDS=1800
  RUN_ENVIRONMENT=() CREATE_FLAGS=() SSH_FLAGS=()
  # shellcheck source=/dev/null
  source "$env_file"
  if [ -n "${flag_name:-}" ]; then NAME="$flag_name"; fi
  for setting in "$@"; do _require "$setting"; done
  _check_form NAME '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'small letters, digits and hyphens, 40 at most'
  _check_form BUCKET 'gs://.+' 'gs://bucket or gs://bucket/folder'
  _check_form SLICES '[1-9][0-9]*' 'a number from 1'
  _check_form SPOT 'yes|no' 'yes or no'
  _check_form QUICK_SECONDS '[0-9]+' 'a number of seconds'
  BUCKET="${BUCKET%/}"
  dry_run="${flag_dry_run:-}"
  records="${SPECDISTILL_RECORDS:-$root/runs/launch}/$NAME"
  if [ -z "$dry_run" ]; then
    mkdir -p -- "$records"
    log="$records/events.log"
  fi
}

is_held() { [ -s "$1" ] && kill -0 "$(cat -- "$1")" 2>/dev/null; }  # lock

lock() {  # what the holder of the lock is busy with: two launchers would act against each other
  [ -z "$dry_run" ] || return 0
  holder="$records/lock"
  if ! (set -C; echo "$$" > "$holder") 2>/dev/null; then
    ! is_held "$holder" || die "another $1: process $(cat -- "$holder")"
    echo "$$" > "$holder"
  fi
  trap 'rm -f -- "$holder"' EXIT
}

# What the hosts get: leaves commit. A file that remembers with which one the run began, so that its
# code does not change in its midst; --commit and --new_commit prevail.
choose_commit() {
  local last
  last="$(git -C "$root" rev-parse HEAD)"
  commit="$last"
  if [ -n "${flag_commit:-}" ]; then
    commit="$(git -C "$root" rev-parse --verify --quiet "$flag_commit^{commit}")" \
      || die "--commit is '$flag_commit', which is no commit of $root"
    return
  fi
  require_committed
  if [ ! -s "$1" ] || [ -n "${flag_new_commit:-}" ]; then return; fi
  commit="$(cat -- "$1")"
  [ "$commit" != "$last" ] || return 0
  git -C "$root" cat-file -e "$commit^{commit}" 2>/dev/null \
    || die "this run began with commit $commit, which is not here any more; --new_commit takes" \
           "the last one, $last"
  note "goes on with commit $commit, with which it began, and not with the last one, $last:" \
       '--new_commit takes that'
}

remember_commit() {  # file
  [ -z "$dry_run" ] || return 0
  mkdir -p -- "$(dirname -- "$1")"
  printf '%s\n' "$commit" > "$1"
}

require_config() {  # after choose_commit
  git -C "$root" cat-file -e "$commit:${config%%:*}" 2>/dev/null \
    || die "${config%%:*} is not in commit $commit, which is all that the hosts get; commit it"
}

require_committed() {  # the hosts get the last commit, and it should be what the user sees
  local changes
  changes="$(git -C "$root" status --porcelain)"
  [ -z "$changes" ] && return
  if [ -n "${flag_allow_uncommitted:-}" ]; then
    echo "warning: left out, since not committed: $(_first_files "$changes")" >&2
  else
    die "not committed, and the hosts get the last commit: $(_first_files "$changes"); commit" \
        '(or stash) them, or leave them out with --allow_uncommitted'
  fi
}

_first_files() {  # output of git status
  local files
  files="$(printf '%s\n' "$1" | cut -c4- | head -n 4 | paste -sd' ' -)"
  [ "$(printf '%s\n' "$1" | wc -l)" -le 4 ] || files="$files ..."
  printf '%s' "$files"
}

read_study() {  # config[:argument] and flags of main; leaves study, config, main_flags and workdir
  [ "$#" -gt 0 ] || die 'name a config, as in configs/quickstart.py'
  local file="${1%%:*}" argument flag
  argument="${1#"$file"}"
  shift
  if [ -e "$file" ]; then file="$(cd -- "$(dirname -- "$file")" && pwd)/${file##*/}"; fi
  file="${file#"$root"/}"
  study="$(basename -- "$file" .py)${argument//[^A-Za-z0-9_.=,-]/-}"
  workdir="$BUCKET/$study"
  config="$file$argument"
  main_flags=()
  for flag in "$@"; do
    case "$flag" in
      --workdir=gs://*) workdir="${flag#--workdir=}" ;;
      --workdir | --workdir=*)
        die "$flag: every host must see the workdir; write --workdir=gs://bucket/folder" ;;
      *) main_flags+=("$flag") ;;
    esac
  done
}

_count_cells() {  # in the commit that the hosts get
  local python="$root/.venv/bin/python" code status=0
  [ -x "$python" ] || python="${PYTHON:-python3}"
  code="$(mktemp -d)"
  git -C "$root" archive --format=tar "$commit" | tar -xf - -C "$code" \
    && "$python" - "$code" "$config" <<'PYTHON' 2>/dev/null || status=1
import importlib.util
import os
import sys
root, config = sys.argv[1:]
sys.path.insert(0, root)
spec = importlib.util.spec_from_file_location('c', os.path.join(root, config.partition(':')[0]))
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
arguments = config.partition(':')[2:] if ':' in config else ()
print(len(module.get_sweep(*arguments)))
PYTHON
  rm -rf -- "$code"
  return "$status"
}

list_cells() {  # the value of --cells, or nothing for all: one number a line
  local part count
  if [ -z "$1" ]; then
    count="$(_count_cells)" || die "the cells of $config cannot be counted here:" \
      'no get_sweep() in it, or no Python with ml_collections; give --cells=0-11'
    seq 0 $((count - 1))
    return
  fi
  [[ "$1" =~ ^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$ ]] \
    || die "--cells is '$1'; it must be as in 0-11 or 0,3,5-7"
  for part in ${1//,/ }; do seq "${part%-*}" "${part#*-}"; done | sort -n -u
}
