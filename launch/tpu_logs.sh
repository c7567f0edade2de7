# The logs of attempts, copied from the hosts to $records/logs. Sourced by tpu_vm.sh.
# shellcheck shell=bash disable=SC2034,SC2154  # names are shared with who sources this

COPY_SECONDS="${SPECDISTILL_COPY_SECONDS:-600}"  # of the log, which goes with a slice that is taken

# Token of an attempt; its number, and failed_host if there is one. The VMs' own logs go with them.
keep_logs() {
  [ -z "$dry_run" ] || return 0
  mkdir -p -- "$records/logs"
  on_first_host log "$1" 2> /dev/null | _keep_log
  [ -z "${failed_host:-}" ] || [ -e "$(_log_of "$failed_host")" ] \
    || on_hosts all log "$1" "$failed_host" 2> /dev/null | _keep_log
}

_keep_log() {  # standard input: a log, whose first line names the host
  local part="$records/logs/part.$$" host kept
  cat > "$part" || true
  host="$(sed -n '/^specdistill_jax on /{s/^[^,]* on \([^,]*\),.*/\1/p;q;}' "$part")"
  kept="$(_log_of "$host")"
  # An answer that broke off must not replace what an earlier one brought.
  if [ -n "$host" ] && [ "$(_size "$part")" -ge "$(_size "$kept")" ]; then
    mv -- "$part" "$kept"
  else
    rm -f -- "$part"
  fi
}

_size() { if [ -e "$1" ]; then wc -c < "$1"; else echo 0; fi; }

_log_of() { echo "$records/logs/attempt-$number-$1.log"; }  # host

show_failure() {
  local kept
  kept="$(_log_of "$failed_host")"
  if [ ! -e "$kept" ]; then note "$failed_host ended with code $failed_code"; return; fi
  note "$failed_host ended with code $failed_code; its last lines, all of which are in $kept:"
  tail -n 40 -- "$kept" | tee -a "$log" >&2
}
