#!/usr/bin/env bash
# A study on a slice of TPU VMs, of one host or many. Settings: launch/tpu.env, from
# tpu.env.example.
#
#   tpu_vm.sh up CONFIG [flags of main]    create, setup and run; a slice that is taken away is
#                                          asked for again, and the study goes on from its workdir
#   tpu_vm.sh create | setup               asks for the slice and waits; puts the last commit there
#   tpu_vm.sh run CONFIG [flags of main]   runs on all hosts; restarts what was interrupted
#   tpu_vm.sh logs                         follows the log of process 0; logs of all attempts, of
#                                          this host and of one that failed, are kept in
#                                          runs/launch/NAME/logs
#   tpu_vm.sh status | stop | delete       shows; ends the study after it has saved; gives all back
#
# Flags, before the config:
#   --env=FILE            settings, in place of launch/tpu.env
#   --name=NAME           in place of NAME in the settings
#   --dry_run             prints every command and runs none
#   --max_restarts=100    (up, run)
#   --delete              (up) gives the slice back when the study has finished
#   --allow_uncommitted   (up, setup) the hosts get the last commit, never what is not committed
#   --new_commit          (up) a run that is taken up goes on with the commit with which it began,
#                         unless this is given: then with the last one
#   --commit=HASH         (up) this commit, whatever the last one is and whatever is not committed
#   --worker=0 --lines=50 --follow=no      (logs)
#
# The workdir is BUCKET/<name of the config> unless --workdir=gs://... is given. What runs on the
# hosts goes on when this script is interrupted or loses its network: the same command takes it up.
# An unexpected error of main (1) is tried again, until it came three times in a row without a run
# of QUICK_SECONDS (settings) in between; what main refuses (2) is not.
# Ends with main's code; 75: unfinished, give the same command again; 69: no slice to run on;
# 64: the launcher's own error, in one sentence.

# shellcheck disable=SC2154  # parse_flags makes flag_*
set -euo pipefail

# shellcheck source=tpu_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/tpu_common.sh"
# shellcheck source=tpu_slice.sh
source "$root/launch/tpu_slice.sh"
# shellcheck source=tpu_logs.sh
source "$root/launch/tpu_logs.sh"
# shellcheck source=tpu_watch.sh
source "$root/launch/tpu_watch.sh"

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

_settings() {  # flags of the command beside --env, --name and --dry_run; the arguments
  local flags="env name dry_run $1"
  shift
  parse_flags "$flags" "$@"
  read_settings PROJECT ZONE BUCKET NAME ACCELERATOR_TYPE RUNTIME_VERSION
  command -v gcloud >/dev/null || [ -n "$dry_run" ] \
    || die 'gcloud is not on PATH; install the Google Cloud CLI and log in (gcloud auth login)'
  dry_state=ACTIVE needs_setup=''
}

_no_study() { [ "${#rest[@]}" = 0 ] || die "'${rest[0]}' is one word too many"; }

_study() {  # leaves the words of `start`
  read_study ${rest[@]+"${rest[@]}"}
  max_restarts="${flag_max_restarts:-100}"
  [[ "$max_restarts" =~ ^[0-9]+$ ]] || die "--max_restarts is '$max_restarts'; it must be a number"
  start_words=(${RUN_ENVIRONMENT[@]+"${RUN_ENVIRONMENT[@]}"} -- "--config=$config"
               ${main_flags[@]+"${main_flags[@]}"} "--workdir=$workdir")
  lock "tpu_vm.sh is busy with $NAME"
  trap _leave INT TERM
}

_leave() {
  trap - INT TERM
  note 'left; what runs on the slice goes on, and the slice costs money: the same command takes' \
       'it up again, logs follows it, stop ends it after it has saved, delete gives the slice back'
  exit 130
}

up() {
  local code=0 memory
  _settings 'max_restarts delete allow_uncommitted commit new_commit' "$@"
  _study
  memory="$records/commits/$study-$(cksum <<< "$workdir" | cut -d' ' -f1)"
  choose_commit "$memory"
  require_config
  remember_commit "$memory"
  dry_state=ABSENT needs_setup=yes
  run_to_the_end yes "${start_words[@]}" || code=$?
  if [ "$code" = 0 ] && [ -z "$dry_run" ]; then rm -f -- "$memory"; fi
  if [ "$code" = 0 ] && [ -n "$flag_delete" ]; then
    delete_slice
  elif [ -z "$dry_run" ]; then
    note "the slice stands and costs money: launch/tpu_vm.sh delete --name=$NAME"
  fi
  return "$code"
}

run() {
  local code=0
  _settings max_restarts "$@"
  _study
  commit="$(commit_on_hosts)"
  [ "$commit" != unknown ] || commit="$(git -C "$root" rev-parse HEAD)"
  require_config
  run_to_the_end no "${start_words[@]}" || code=$?
  return "$code"
}

create() {
  _settings '' "$@"
  _no_study
  dry_state=ABSENT
  await_slice || return "$UNAVAILABLE"
}

set_up() {
  _settings allow_uncommitted "$@"
  _no_study
  choose_commit /dev/null
  setup || { note 'the hosts could not be set up'; return "$UNAVAILABLE"; }
}

logs() {
  local verb=follow
  _settings 'worker lines follow' "$@"
  _no_study
  if [ "$flag_follow" = no ]; then verb='tail'; fi
  if [ "$SLICES" != 1 ]; then NAME="$NAME-0" SLICES=1; fi
  on_hosts "${flag_worker:-0}" "$verb" "${flag_lines:-50}"
}

status() {
  local state
  _settings '' "$@"
  _no_study
  state="$(slice_state)"
  echo "slice $NAME: ${state#* }"
  case "$state" in
    READY*) ask_hosts state || note 'not every host answers' ;;
    FAILED*) tpus queued-resources describe "$NAME" ;;
  esac
}

stop() {
  local lines
  _settings '' "$@"
  _no_study
  ask_hosts stop > /dev/null || note 'not every host answers'
  note 'asked the study to save and end'
  while lines="$(ask_hosts state || true)" && grep -q ' running$' <<< "$lines"; do
    pause "$POLL_SECONDS"
  done
  printf '%s\n' "$lines"
}

delete() {
  local number token
  _settings '' "$@"
  _no_study
  if [ -z "$dry_run" ] && [ -s "$records/attempt" ] && [[ "$(slice_state)" == READY* ]]; then
    read -r number token _ < "$records/attempt"
    keep_logs "$token" || true  # no log is worth a slice that is not given back
  fi
  delete_slice
}

verb="${1:-}"
shift || true
case "$verb" in
  up | run | create | logs | status | stop | delete) "$verb" "$@" ;;
  setup) set_up "$@" ;;
  --help) usage ;;
  *) usage >&2; exit "$OWN_ERROR" ;;
esac
