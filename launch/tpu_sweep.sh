#!/usr/bin/env bash
# The cells of a sweep, `get_sweep()` of a config, on several slices at once: each slice takes the
# next cell when it has finished one. Settings: launch/tpu.env, from tpu.env.example.
#
#   tpu_sweep.sh --slices=4 [flags] CONFIG [flags of main]
#
#   --slices=N            slices NAME-s0 ... NAME-s(N-1), each driven by `tpu_vm.sh up`
#   --cells=0-11          which cells, as in 0,3,5-7; all unless given
#   --delete              gives a slice back when no cell is left for it
#   --env=FILE --name=NAME --dry_run --max_restarts=100 --allow_uncommitted    as in tpu_vm.sh
#
# Cell 3 runs with --sweep=3 in BUCKET/<name of the config>/cell-3. A cell that failed is named at
# the end, and the others go on. Given again, the command skips cells that have finished, takes up
# those that run, and tries those again that failed.

# shellcheck disable=SC2154  # parse_flags makes flag_*
set -euo pipefail

# shellcheck source=tpu_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/tpu_common.sh"

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

_take_cell() {  # slice: its unfinished cell of an earlier command, else the next that nobody has
  local slice="$1" cell
  for cell in $cells; do
    [ -e "$records/$cell/exit" ] || [ "$(cat "$records/$cell/slice" 2>/dev/null)" != "$slice" ] \
      || { echo "$cell"; return; }
  done
  for cell in $cells; do
    mkdir -- "$records/$cell" 2>/dev/null || continue  # of several, one succeeds
    echo "$slice" > "$records/$cell/slice"
    echo "$cell"
    return
  done
  return 1
}

_up() {  # slice, cell
  local words=("--env=$env_file" "--name=$1" "--max_restarts=${flag_max_restarts:-100}")
  if [ -n "$dry_run" ]; then words+=(--dry_run); fi
  if [ -n "$flag_allow_uncommitted" ]; then words+=(--allow_uncommitted); fi
  "$root/launch/tpu_vm.sh" up "${words[@]}" "$config" ${main_flags[@]+"${main_flags[@]}"} \
    "--workdir=$workdir/cell-$2" "--sweep=$2"
}

_work() {  # slice: cell after cell
  local slice="$1" cell code
  while cell="$(_take_cell "$slice")"; do
    note "$slice: cell $cell begins"
    code=0
    _up "$slice" "$cell" >> "$records/$slice.log" 2>&1 || code=$?
    case "$code" in
      0) note "$slice: cell $cell has finished" ;;
      "$UNAVAILABLE")
        rm -r -- "${records:?}/$cell"
        note "$slice: no slice to run on, cell $cell is for the others; see $records/$slice.log"
        return ;;
      "$AGAIN") note "$slice: cell $cell is unfinished; the same command takes it up"; return ;;
      *) note "$slice: cell $cell failed with code $code; see $records/$slice.log" ;;
    esac
    echo "$code" > "$records/$cell/exit"
  done
  if [ -n "$flag_delete" ]; then
    "$root/launch/tpu_vm.sh" delete "--env=$env_file" "--name=$slice" \
      >> "$records/$slice.log" 2>&1 || note "$slice: could not be given back; see its log"
  fi
}

_forget_failures() {
  local cell
  for cell in $cells; do
    if [ -e "$records/$cell/exit" ] && [ "$(cat "$records/$cell/exit")" != 0 ]; then
      rm -r -- "${records:?}/$cell"
    fi
  done
}

_leave() {
  local worker
  trap - INT TERM
  for worker in $workers; do kill -TERM -- "-$worker" 2>/dev/null || true; done
  note 'left; what runs on the slices goes on, and they cost money: the same command takes all up' \
       "again, launch/tpu_vm.sh delete --name=$NAME-s0 (and so on) gives them back"
  exit 130
}

_spread() {
  local index
  trap _leave INT TERM
  set -m  # each slice in a process group of its own, so that _leave reaches its ssh as well
  for ((index = 0; index < flag_slices; index++)); do
    _work "$NAME-s$index" < /dev/null &
    workers="$workers $!"
  done
  for index in $workers; do wait "$index" || true; done
}

_sum_up() {  # 0 if all cells have finished
  local cell code all=0
  for cell in $cells; do
    code="$(cat "$records/$cell/exit" 2>/dev/null || echo none)"
    [ "$code" = 0 ] && continue
    all=1
    if [ "$code" != none ]; then
      note "cell $cell FAILED with code $code: $workdir/cell-$cell"
    elif [ -e "$records/$cell/slice" ]; then
      note "cell $cell is unfinished on $(cat "$records/$cell/slice"): the same command takes it up"
    else
      note "cell $cell has not run"
    fi
  done
  [ "$all" = 0 ] && note "all cells have finished; the results are in $workdir"
  return "$all"
}

_show() {  # dry run: cell after cell, slices in turn
  local cell turn=0
  for cell in $cells; do
    _up "$NAME-s$((turn % flag_slices))" "$cell"
    turn=$((turn + 1))
  done
}

parse_flags 'env name dry_run max_restarts allow_uncommitted slices cells delete' "$@"
[[ "$flag_slices" =~ ^[1-9][0-9]*$ ]] || die "--slices is '$flag_slices'; it must be 1 or more"
read_settings PROJECT ZONE BUCKET NAME ACCELERATOR_TYPE RUNTIME_VERSION
read_study ${rest[@]+"${rest[@]}"}
require_committed
cells="$(list_cells "$flag_cells")"
if [ -n "$dry_run" ]; then _show; exit; fi
lock "tpu_sweep.sh is busy with $NAME"
# Other flags make another sweep, whose cells have not run.
sweep="$(quote "$config" ${main_flags[@]+"${main_flags[@]}"} "$workdir")"
records="$records/sweep-$study-$(cksum <<< "$sweep" | cut -d' ' -f1)"
mkdir -p -- "$records"
workers=''
_forget_failures
_spread
_sum_up
