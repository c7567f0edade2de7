# A slice of TPU VMs: asked for as a queued resource, its hosts reached by ssh. For tpu_vm.sh.
# shellcheck shell=bash disable=SC2034,SC2154  # names are shared with who sources this

POLL_SECONDS="${SPECDISTILL_POLL_SECONDS:-30}"
TRIES=3  # of what should work at the first

nodes() {  # a multislice request has several
  local index
  if [ "$SLICES" = 1 ]; then printf '%s\n' "$NAME"; return; fi
  for ((index = 0; index < SLICES; index++)); do printf '%s\n' "$NAME-$index"; done
}

tpus() {  # words of `gcloud compute tpus`; questions are never asked back
  call gcloud compute tpus "$@" "--project=$PROJECT" "--zone=$ZONE" --quiet
}

_ask_state() {  # what to describe: the state that gcloud prints, or ABSENT, or UNKNOWN
  local state errors="$records/describe.txt"
  if [ -n "$dry_run" ]; then tpus "$@"; echo "$dry_state"; return; fi
  if state="$(tpus "$@" 2>"$errors")" && [ -n "$state" ]; then
    printf '%s\n' "$state"
  elif grep -q NOT_FOUND "$errors"; then
    echo ABSENT
  else  # no network, no permission: this must never be taken for an absent slice
    echo UNKNOWN
  fi
}

# Prints two words: what to do about the slice, and gcloud's state that says so.
#   READY: it stands.  WAITING: it will.  LEAVING: it is being taken away.  GONE: it was taken away.
#   FAILED: the request failed.  ABSENT: there is no request.  UNKNOWN: gcloud does not answer.
slice_state() {
  local state node
  state="$(_ask_state queued-resources describe "$NAME" '--format=value(state.state)')"
  case "$state" in
    ACTIVE) ;;
    SUSPENDED) echo "GONE $state"; return ;;
    SUSPENDING | DELETING) echo "LEAVING $state"; return ;;
    FAILED | ABSENT | UNKNOWN) echo "$state $state"; return ;;
    *) echo "WAITING $state"; return ;;
  esac
  # A request may stay ACTIVE for a while after its spot nodes were taken back.
  for node in $(nodes); do
    state="$(_ask_state tpu-vm describe "$node" '--format=value(state)')"
    case "$state" in
      READY | ACTIVE) ;;  # ACTIVE: a dry run
      PREEMPTED | TERMINATED | STOPPED | ABSENT) echo "GONE $state"; return ;;
      UNKNOWN) echo 'UNKNOWN UNKNOWN'; return ;;
      *) echo "WAITING $state"; return ;;
    esac
  done
  echo 'READY READY'
}

slice_was_taken() { case "$(slice_state)" in GONE* | LEAVING* | ABSENT*) ;; *) return 1 ;; esac; }

create_slice() {
  local words=("--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION")
  if [ "$SLICES" = 1 ]; then
    words+=("--node-id=$NAME")
  else
    words+=("--node-count=$SLICES" "--node-prefix=$NAME")
  fi
  if [ "$SPOT" = yes ]; then words+=(--spot); fi
  if [ -n "${VALID_UNTIL:-}" ]; then words+=("--valid-until-duration=$VALID_UNTIL"); fi
  words+=(${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"})
  note "asking for a slice: $ACCELERATOR_TYPE in $ZONE, spot: $SPOT, slices: $SLICES"
  tpus queued-resources create "$NAME" "${words[@]}"
}

delete_slice() {
  note 'deleting the slice'
  tpus queued-resources delete "$NAME" --force
}

_complain() {  # what went wrong; 1 if that was one time too many
  failures=$((failures + 1))
  note "$1 ($failures of at most $TRIES times in a row)"
  if [ -s "$records/describe.txt" ]; then tail -n 3 -- "$records/describe.txt" >&2; fi
  [ "$failures" -lt "$TRIES" ]
}

# Waits until the slice stands; asks for it if there is none, and anew if it was taken away.
# Sets needs_setup to `bare` when its hosts are new. Returns 1 when that is not going to work.
await_slice() {
  local verdict state seen='' failures=0
  while :; do
    read -r verdict state <<< "$(slice_state)"
    if [ "$state" != "$seen" ]; then note "the slice is $state"; seen="$state"; fi
    # Once gcloud has answered, a silence is the network's: it comes back.
    if [ "$verdict" != UNKNOWN ]; then seen_once=yes; fi
    case "$verdict" in
      READY) return ;;
      ABSENT)
        needs_setup=bare dry_state=ACTIVE
        create_slice || _complain 'it could not be asked for' || return 1 ;;
      GONE) delete_slice || _complain 'it could not be deleted' || return 1 ;;
      FAILED)
        _complain 'the request failed; tpu_vm.sh status says why' || return 1
        delete_slice || true ;;
      UNKNOWN) if [ -z "$seen_once" ]; then _complain 'gcloud does not answer' || return 1; fi ;;
    esac
    pause "$POLL_SECONDS"
  done
}
seen_once=''

on_hosts() {  # worker, or all; words of tpu_host.sh: its output. 1 if a host did not answer
  local worker="$1" node command status=0
  shift
  command="$(quote bash specdistill/tpu_host.sh "$@")"
  for node in $(nodes); do
    tpus tpu-vm ssh "$node" "--worker=$worker" ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} \
      "--command=$command" < /dev/null || status=1
  done
  return "$status"
}

on_first_host() {  # words of tpu_host.sh
  local first
  read -r first <<< "$(nodes)"
  NAME="$first" SLICES=1 on_hosts 0 "$@"
}

ask_hosts() {  # the same, gcloud's chatter put aside: what the hosts report of themselves
  local errors="$records/ssh.txt"
  if [ -n "$dry_run" ]; then errors=/dev/null; fi
  on_hosts all "$@" 2> "$errors" | sed -n 's/^specdistill-host //p'
}

commit_on_hosts() { cat -- "$records/commit_on_hosts" 2>/dev/null || echo unknown; }

setup() {  # the commit that was chosen, and an environment for it, on every host
  local bundle="$records/specdistill" node
  note "setting up: commit $commit"
  call rm -f -- "$records/commit_on_hosts"
  call mkdir -p -- "$bundle" \
    && call git -C "$root" archive --format=tar.gz "--output=$bundle/code.tar.gz" "$commit" \
    && call cp -- "$root/launch/tpu_host.sh" "$bundle/" || return 1
  for node in $(nodes); do
    tpus tpu-vm scp --recurse "$bundle" "$node:" --worker=all \
      ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} < /dev/null || return 1
  done
  on_hosts all setup || return 1
  [ -n "$dry_run" ] || printf '%s\n' "$commit" > "$records/commit_on_hosts"
}
