#!/usr/bin/env bash
# A study on GKE, as a workload of a cluster that xpk has made or adapted. Settings: launch/tpu.env,
# from tpu.env.example.
#
#   xpk.sh run CONFIG [flags of main]    submits the last commit as the workload NAME
#   xpk.sh sweep --cells=0-11 CONFIG [flags of main]     a workload NAME-c3 for cell 3, and so on;
#                          cells that read earlier ones: when those have finished, with --cells
#   xpk.sh list | logs | delete
#
# Flags, before the config:
#   --env=FILE            settings, in place of launch/tpu.env
#   --name=NAME           in place of NAME in the settings
#   --dry_run             prints every command and runs none
#   --max_restarts=100 --allow_uncommitted     (run, sweep)
#   --lines=50            (logs, of process 0)
#
# The cluster queues the workload and restarts it when it was pre-empted. The workdir is
# BUCKET/<name of the config> unless --workdir=gs://... is given; a workload goes on from there.

# shellcheck disable=SC2154  # parse_flags makes flag_*
set -euo pipefail

# shellcheck source=tpu_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/tpu_common.sh"

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

_settings() {  # flags of the command beside --env, --name and --dry_run; the arguments
  local flags="env name dry_run $1"
  shift
  parse_flags "$flags" "$@"
  read_settings PROJECT ZONE BUCKET NAME ACCELERATOR_TYPE XPK_CLUSTER DOCKER_IMAGE
  command -v xpk >/dev/null || [ -n "$dry_run" ] || die 'xpk is not on PATH; pip install xpk'
}

_workload() {  # words of `xpk workload`
  call xpk workload "$@" "--cluster=$XPK_CLUSTER" "--project=$PROJECT" "--zone=$ZONE"
}

_unpack() {  # the last commit, for xpk to lay over the image
  call rm -rf -- "$records/code"
  call mkdir -p -- "$records/code"
  call git -C "$root" archive --format=tar "--output=$records/code.tar" "$commit"
  call tar -xf "$records/code.tar" -C "$records/code"
}

_submit() {  # name of the workload, further flags of main
  local name="$1" command
  shift
  # exec: the program itself gets the SIGTERM of a pre-emption, not a shell that waits for it.
  command="exec $(quote env PYTHONPATH=. TF_CPP_MIN_LOG_LEVEL=3 \
    ${RUN_ENVIRONMENT[@]+"${RUN_ENVIRONMENT[@]}"} \
    python -P -m specdistill_jax.main "--config=$config" \
    ${main_flags[@]+"${main_flags[@]}"} "$@")"
  # Of the codes below 127, xpk restarts 42 only; 75 is ours for: saved, run it again.
  _workload create "--workload=$name" "--tpu-type=$ACCELERATOR_TYPE" "--num-slices=$SLICES" \
    "--base-docker-image=$DOCKER_IMAGE" "--script-dir=$records/code" "--priority=$PRIORITY" \
    "--max-restarts=${flag_max_restarts:-100}" --restart-on-exit-codes=75 \
    --termination-grace-period-seconds=120 "--command=$command"
}

_prepare() {
  read_study ${rest[@]+"${rest[@]}"}
  choose_commit /dev/null
  require_config
  _unpack
}

run() {
  _settings 'max_restarts allow_uncommitted' "$@"
  _prepare
  _submit "$NAME" "--workdir=$workdir"
}

sweep() {
  local cell
  _settings 'max_restarts allow_uncommitted cells' "$@"
  _prepare
  for cell in $(list_cells "$flag_cells"); do
    _submit "$NAME-c$cell" "--workdir=$workdir/cell-$cell" "--sweep=$cell"
  done
}

list() { _settings '' "$@"; _workload list "--filter-by-job=$NAME"; }

logs() {
  local job=jobset.sigs.k8s.io
  _settings lines "$@"
  _workload list "--filter-by-job=$NAME"  # which also points kubectl at the cluster
  call kubectl logs --follow "--tail=${flag_lines:-50}" --container=jax-tpu \
    "--selector=$job/jobset-name=$NAME,$job/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

delete() { _settings '' "$@"; _workload delete "--workload=$NAME" --force; }

verb="${1:-}"
shift || true
case "$verb" in
  run | sweep | list | logs | delete) "$verb" "$@" ;;
  --help) usage ;;
  *) usage >&2; exit "$OWN_ERROR" ;;
esac
