#!/usr/bin/env bash
# The cells of a sweep, `get_sweep()` of a config, on several slices at once: each slice takes the
# next cell when it has finished one. Settings: launch/tpu.env, from tpu.env.example.
#
#   tpu_sweep.sh --slices=4 [flags] CONFIG [flags of main]
#
#   --slices=N            slices NAME-s0 ... NAME-s(N-1), each driven by `tpu_vm.sh up`
#   --cells=0-11          which cells, as in 0,3,5-7; all unless given
#   --delete              gives a slice back when no cell is left for it
#   --env=FILE --name=NAME --dry_run --max_restarts=100 --allow_uncommitted --new_commit
#                         as in tpu_vm.sh
#
# Cells start in any order, several at once. The cells of some configs read what earlier cells have
# trained (their docstrings say which): start those first, with --cells, and the cells that read
# them, again with --cells, when they have finished. What comes too early is refused (code 2).
#
# Cell 3 runs with --sweep=3 in BUCKET/<name of the config>/cell-3. A cell that failed is named at
# the end, and the others go on; but a slice on which two in a row failed soon (QUICK_SECONDS in the
# settings) takes no more. Given again, the command skips cells that have finished, takes up those
# that run, and tries those again that failed. Ends with 1 if a cell has not finished, and with 64
# for an error of its own.

# shellcheck disable=SC2154  # parse_flags makes flag_*
set -euo pipefail

# shellcheck source=tpu_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/tpu_common.sh"
# shellcheck source=tpu_slice.sh
source "$root/launch/tpu_slice.sh"

QUICK_CELLS=2  # that fail soon, one after the other: the slice is taken for the reason

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# Slice: its unfinished cell of an earlier command (CELL taken-up), else the next that nobody has
# (CELL new).
_take_cell() {
  local slice="$1" cell
  for cell in $cells; do
    [ -e "$records/$cell/exit" ] || [ "$(cat "$records/$cell/slice" 2>/dev/null)" != "$slice" ] \
      || { echo "$cell taken-up"; return; }
  done
  for cell in $cells; do
    mkdir -- "$records/$cell" 2>/dev/null || continue  # of several, one succeeds
    echo "$slice" > "$records/$cell/slice"
    echo "$cell new"
    return
  done
  return 1
}

_is_idle() {  # slice: no study runs there, for certain
  local NAME="$1" records="$slices/$1" lines
  ! is_held "$records/lock" || return 1
  case "$(slice_state)" in
    GONE* | ABSENT* | FAILED*) ;;
    READY*) lines="$(ask_hosts state)" && ! grep -q ' running$' <<< "$lines" ;;
    *) return 1 ;;
  esac
}

# Slice, cell, new or taken-up: what becomes of a cell that did not end there, in words. Two slices
# must never run the same cell.
_put_back() {
  if [ "$3" = new ] || _is_idle "$1"; then
    rm -r -- "${records:?}/$2"
    echo "cell $2 is for the others"
  else
    echo "cell $2 stays with it, since it may still run there"
  fi
}

_up() {  # slice, cell
  local words=("--env=$env_file" "--name=$1" "--max_restarts=${flag_max_restarts:-100}")
  if [ -n "$dry_run" ]; then words+=(--dry_run); fi
  words+=("--commit=$commit")  # chosen once, when the sweep began
  "$root/launch/tpu_vm.sh" up "${words[@]}" "$config" ${main_flags[@]+"${main_flags[@]}"} \
    "--workdir=$workdir/cell-$2" "--sweep=$2"
}

_own_error() {  # slice, cell, new or taken-up, code of tpu_vm.sh
  local origin="$3"
  # With any other code it ended unforeseen: it may have started the cell.
  [ "$4" = "$OWN_ERROR" ] || origin=taken-up
  note "$1: not the study but its launcher failed, with code $4, so this slice takes no more:" \
       "$(tail -n 1 -- "$records/$1.log"); $(_put_back "$1" "$2" "$origin")"
}

_work() {  # slice: cell after cell
  local slice="$1" cell origin code ended ran quick=0 stands
  stands="it stands and costs money: launch/tpu_vm.sh delete --name=$slice"
  while read -r cell origin <<< "$(_take_cell "$slice")" && [ -n "$cell" ]; do
    note "$slice: cell $cell begins"
    code=0 ended='' ran=''
    rm -f -- "$slices/$slice/failed"
    _up "$slice" "$cell" >> "$records/$slice.log" 2>&1 || code=$?
    case "$code" in
      0) note "$slice: cell $cell has finished"; quick=0 ;;
      "$UNAVAILABLE")
        note "$slice: no slice to run on; $(_put_back "$slice" "$cell" "$origin");" \
             "see $records/$slice.log"
        return ;;
      "$AGAIN") note "$slice: cell $cell is unfinished; the same command takes it up"; return ;;
      *)
        read -r ended ran 2>/dev/null < "$slices/$slice/failed" || true
        if [ "$ended" != "$code" ]; then _own_error "$slice" "$cell" "$origin" "$code"; return; fi
        note "$slice: cell $cell failed with code $code; see $records/$slice.log"
        if [ "$ran" -lt "$QUICK_SECONDS" ]; then quick=$((quick + 1)); else quick=0; fi ;;
    esac
    echo "$code" > "$records/$cell/exit"
    if [ "$quick" -ge "$QUICK_CELLS" ]; then
      note "$slice: $quick cells in a row failed within $QUICK_SECONDS s each, so this slice" \
           "takes no more; $stands"
      return
    fi
  done
  if [ -n "$flag_delete" ]; then
    "$root/launch/tpu_vm.sh" delete "--env=$env_file" "--name=$slice" \
      >> "$records/$slice.log" 2>&1 || note "$slice: could not be given back; see its log"
  fi
}

# Fewer slices than in an earlier command: nobody takes up the cells of those that are left out.
# They are for all where nothing can run there any more.
_release() {
  local cell slice
  for cell in $cells; do
    slice="$(cat "$records/$cell/slice" 2>/dev/null || true)"
    if [ -z "$slice" ] || [ -e "$records/$cell/exit" ] || _is_driven "$slice"; then continue; fi
    if _is_idle "$slice"; then
      rm -r -- "${records:?}/$cell"
      note "cell $cell is for all slices: $slice, which began it, has no part in this command"
    fi
  done
}

_is_driven() { [ "${1##*-s}" -lt "$flag_slices" ]; }  # slice: by this command

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
  local cell code slice all=0
  for cell in $cells; do
    code="$(cat "$records/$cell/exit" 2>/dev/null || echo none)"
    [ "$code" = 0 ] && continue
    all=1
    if [ "$code" != none ]; then
      note "cell $cell FAILED with code $code: $workdir/cell-$cell"
    elif [ -e "$records/$cell/slice" ]; then
      slice="$(cat "$records/$cell/slice")"
      if _is_driven "$slice"; then
        note "cell $cell is unfinished on $slice: the same command takes it up"
      else
        note "cell $cell may still run on $slice, which --slices=$flag_slices leaves out:" \
             "--slices=$((${slice##*-s} + 1)) takes it up; once launch/tpu_vm.sh delete" \
             "--name=$slice has given it back, the same command does"
      fi
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

parse_flags 'env name dry_run max_restarts allow_uncommitted new_commit slices cells delete' "$@"
[[ "$flag_slices" =~ ^[1-9][0-9]*$ ]] || die "--slices is '$flag_slices'; it must be 1 or more"
read_settings PROJECT ZONE BUCKET NAME ACCELERATOR_TYPE RUNTIME_VERSION
read_study ${rest[@]+"${rest[@]}"}
# Other flags make another sweep, whose cells have not run.
sweep="$(quote "$config" ${main_flags[@]+"${main_flags[@]}"} "$workdir")"
sweep="$records/sweep-$study-$(cksum <<< "$sweep" | cut -d' ' -f1)"
choose_commit "$sweep/commit"
require_config
cells="$(list_cells "$flag_cells")"
if [ -n "$dry_run" ]; then _show; exit; fi
lock "tpu_sweep.sh is busy with $NAME"
remember_commit "$sweep/commit"
slices="${records%/*}"  # where launchers of slices have their records
records="$sweep"
workers=''
_forget_failures
_release
_spread
_sum_up
